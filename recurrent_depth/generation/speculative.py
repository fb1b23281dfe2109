"""Self-speculation: draft tokens with few iterations, then run the remaining iterations for all drafts at once.

States and cache entries of drafts are reused, so no iteration is computed twice. Drafted and verified tokens are drawn
with the same noise (a function of seed, request and position), so that the written tokens equal those of plain
decoding, sampling included. A draft is accepted if it equals the verified token; a rejected one is overwritten in the
cache.

Shapes: n requests, G drafted tokens, V vocabulary.
"""

from recurrent_depth.generation.batch import Batch, prefill
from recurrent_depth.generation.cache import RecurrentCache
from recurrent_depth.generation.config import Speculation
from recurrent_depth.generation.request import DecodableModel, Decoded, Requests, Stopping

MODE = "self-speculation"


def decode_speculatively(
    model: DecodableModel, requests: Requests, cache: RecurrentCache, speculation: Speculation
) -> Decoded:
    """Decode all requests. The cache must have room for the drafts of one round beyond the requests."""
    stopping = requests.one_depth(MODE)
    requests.refuse(MODE, "exit", "thinking", "warm_start", "state_seed", "scores", full_cache=True)
    if speculation.steps >= stopping.most:
        raise ValueError(f"speculation.steps is {speculation.steps}; it must be fewer than num_steps {stopping.most}")
    return _Rounds(model, requests, cache, speculation).run()


class _Rounds:
    """A batch of requests, with the first and the next column of each."""

    def __init__(
        self, model: DecodableModel, requests: Requests, cache: RecurrentCache, speculation: Speculation
    ) -> None:
        self.requests, self.speculation = requests, speculation
        batch = Batch(model, requests, cache)
        logits, _ = prefill(batch)
        self.tokens = batch.tokens
        self.starts = [requests.longest - len(prompt) for prompt in requests.prompts]
        self.next = [requests.longest] * len(requests.prompts)
        everyone = list(range(len(requests.prompts)))
        for request, token in enumerate(requests.draw(logits, everyone, [len(p) for p in requests.prompts])):
            requests.write(request, token)

    def run(self) -> Decoded:
        while any(self.requests.running):
            self._round([request for request, running in enumerate(self.requests.running) if running])
        self.requests.result.computed_iterations = self.tokens.computed
        return self.requests.result

    def _round(self, running: list[int]) -> None:
        """Draft, verify, and write the verified tokens."""
        requests, result, n = self.requests, self.requests.result, len(running)
        missing = max(requests.options.max_new_tokens - len(result.tokens[request]) for request in running)
        G, few, most = min(self.speculation.tokens, missing), self.speculation.steps, requests.most_steps
        drafted, groups = [[result.tokens[request][-1] for request in running]], self.tokens.empty
        for g in range(G):
            self.tokens.start(drafted[-1], running, *self._places(running, g))
            for _ in range(few):
                self.tokens.iterate()
            draft = self.tokens.take()
            positions = [self.next[request] + g + 1 - self.starts[request] for request in running]
            drafted.append(requests.draw(self.tokens.logits(draft)[:, 0], running, positions))
            groups = groups + draft
        # Sorted by lane, so that attention processes the drafts of a lane as a block.
        self.tokens.put(groups.at([g * n + i for i in range(n) for g in range(G)]))
        for _ in range(most - few):
            self.tokens.iterate()
        logits = self.tokens.logits(self.tokens.take())[:, 0]  # [n G, V]
        asked = [request for request in running for _ in range(G)]
        positions = [self.next[request] + g + 1 - self.starts[request] for request in running for g in range(G)]
        chosen = requests.draw(logits, asked, positions)
        for i, request in enumerate(running):
            context = self.next[request] + G - self.starts[request]
            requests.count(request, G, G * few, context)
            requests.count(request, G, G * (most - few), context, started=0)
            mine = chosen[i * G : (i + 1) * G]
            right = [drafted[g + 1][i] == mine[g] for g in range(G - 1)]  # the last draft was not fed to the model
            agreed = right.index(False) if False in right else len(right)
            result.drafted += G - 1
            result.accepted += agreed
            for token in mine[: agreed + 1]:
                if requests.running[request]:
                    requests.write(request, token)
            self.next[request] += agreed + 1

    def _places(self, running: list[int], g: int) -> tuple[list[int], list[int], list[Stopping]]:
        """Return columns, first columns and limits of the g-th draft of each request."""
        columns = [self.next[request] + g for request in running]
        return columns, [self.starts[request] for request in running], [self.requests.stopping[0]] * len(running)
