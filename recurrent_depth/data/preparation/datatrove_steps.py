"""A task of ours as a step of datatrove. Imported only if datatrove is installed."""

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from recurrent_depth.data.preparation.job import Job
from recurrent_depth.data.preparation.phases import run_task


class TaskStep(PipelineStep):
    """Runs a task of a phase; datatrove's rank is its number."""

    type = "prepare"

    def __init__(self, job: Job, phase: str) -> None:
        self.job, self.phase = job, phase
        self.name = phase
        super().__init__()

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Run the task. There are no documents to pass on."""
        run_task(self.job, self.phase, rank)
        return None
