"""`recurrent-depth plan`: memory and time of a run, computed from its options."""

from recurrent_depth.planning.config import PlanConfig
from recurrent_depth.planning.devices import DEVICES, GB, LINK_EFFICIENCY, RESERVE, Device
from recurrent_depth.planning.finetuning import finetuning_table
from recurrent_depth.planning.measured import nearest_step, read_measured_steps
from recurrent_depth.planning.pretraining import Job, communication, fits, memory, remedies, throughput


def plan(config: PlanConfig) -> None:
    """Print the memory and time of a pretraining run, or the memory of fine-tuning."""
    if config.run is None or config.num_gpus is None:
        print(finetuning_table(config.finetuning))
        return
    job = Job(config.run, config.num_gpus, config.tokens or config.run.model.block_size)
    device = DEVICES[config.device]
    shares = {f"assumed: {config.utilisation:.0%} of the peak": config.utilisation}
    notes = ["all numbers are computed, not measured"]
    if config.measured is not None:
        step = nearest_step(read_measured_steps(config.measured), job)
        shares[f"measured: {step.hfu:.1%} of the peak"] = step.hfu
        notes = [f"all numbers are computed; the measured share of the peak is that of {step}"]
        if config.device.lower() not in step.gpu.lower():
            notes.append(f"{step.gpu} is not {config.device}; the same share of the peak is taken for both")
    print(f"{config.num_gpus} x {config.device}; {'; '.join(notes)}\n")
    print(memory_table(job, device))
    print(time_table(job, device, shares))


def memory_table(job: Job, device: Device) -> str:
    """Return a table of the memory of one GPU by part, and whether it fits."""
    parts = memory(job)
    lines = ["| memory of one GPU | GB |", "|---|---|"]
    lines += [f"| {name} | {size / GB:.2f} |" for name, size in parts.items()]
    usable = device.memory * (1 - RESERVE)
    lines.append(f"| peak, of {usable / GB:.0f} usable | {sum(parts.values()) / GB:.2f} |")
    if fits(job, device):
        return "\n".join([*lines, "", "It fits.", ""])
    changes = remedies(job, device)
    advice = (
        f"It fits with {', '.join(changes)}." if changes else "No option of runtime is sufficient: raise micro_steps."
    )
    return "\n".join([*lines, "", f"It does not fit. {advice}", ""])


def time_table(job: Job, device: Device, shares: dict[str, float]) -> str:
    """Return a table of FLOPs, communication and time, with a column for each share of the peak, by its title."""
    lines = [f"| time | {' | '.join(shares)} |", "|---" * (1 + len(shares)) + "|"]
    columns = [_times(job, device, share) for share in shares.values()]
    lines += [f"| {name} | {' | '.join(column[name] for column in columns)} |" for name in columns[0]]
    return "\n".join(lines)


def _times(job: Job, device: Device, utilisation: float) -> dict[str, str]:
    speed, sent = throughput(job, device, utilisation), communication(job)
    total = job.tokens_per_step * job.run.steps
    days = total / speed.tokens_per_second / 86_400
    return {
        "useful FLOPs per token, mean over the run": f"{speed.useful / 1e9:,.1f} GFLOP",
        "executed FLOPs per token, with recomputation": f"{speed.executed / 1e9:,.1f} GFLOP",
        "tokens per training step, and of the run": f"{job.tokens_per_step:,} and {total:,}",
        "gathered per training step (weights)": f"{sent['gather'] / GB:.2f} GB",
        "reduce-scattered per training step (gradients)": f"{sent['reduce_scatter'] / GB:.2f} GB",
        "all-reduced per training step (over replicas)": f"{sent['all_reduce'] / GB:.2f} GB",
        "compute per training step": f"{speed.compute_seconds:.2f} s",
        f"communication per training step, {LINK_EFFICIENCY:.0%} of links": f"{speed.communication_seconds:.2f} s",
        "tokens/s": f"{speed.tokens_per_second:,.0f}",
        "days of the run": f"{days:,.1f}",
    }
