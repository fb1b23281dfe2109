"""Label questions with subject domains: given ones, chosen by a model, or found by clustering."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from recurrent_depth.checks import check_at_least, one_section
from recurrent_depth.data.layout import DataError
from recurrent_depth.reasoning.config import SourceConfig
from recurrent_depth.reasoning.curation.duplicates import evaluation_questions
from recurrent_depth.reasoning.curation.stages import Context, Outcome, Stage, needed_version, source_inputs, stage
from recurrent_depth.reasoning.curation.writers import WriterConfig, ask, check_prompt, fill
from recurrent_depth.reasoning.pool import Example


class Labeller(Protocol):
    """Finds the domains of questions; None where it cannot."""

    def fingerprint(self) -> Any:
        """Return plain JSON that changes when labels may change."""

    def label(self, pool: Sequence[str], others: Sequence[str], context: Context) -> tuple[list[str | None], ...]:
        """Return the domains of the pool's questions and of others, which must not influence the former."""


@dataclass(frozen=True)
class Clusters:
    """Clustering by k-means of TF-IDF vectors of English words, reduced by SVD (scikit-learn).

    The name of a domain is its most typical words.

    Args:
        count: number of domains.
        components: dimensions after the SVD.
        terms: words in a name.
    """

    count: int = 50
    components: int = 64
    terms: int = 3

    def __post_init__(self) -> None:
        for name in ("count", "components", "terms"):
            check_at_least(name, getattr(self, name), 1)

    def fingerprint(self) -> Any:
        return ["clusters", needed_version("sklearn", "scikit-learn")]

    def label(self, pool: Sequence[str], others: Sequence[str], context: Context) -> tuple[list[str | None], ...]:
        from sklearn.cluster import KMeans
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import Normalizer

        if len(pool) < self.count:
            raise DataError(f"{len(pool)} rows cannot form {self.count} clusters; lower labeller.clusters.count")
        words = TfidfVectorizer(stop_words="english", token_pattern=r"[A-Za-z]{3,}", min_df=2, max_df=0.5)
        try:
            vectors = words.fit_transform(pool)
        except ValueError as error:
            raise DataError(
                f"the questions share too few words to cluster ({error}); use labels of the source or of a model"
            ) from error
        components = max(min(self.components, min(vectors.shape) - 1), 1)
        reduce = make_pipeline(TruncatedSVD(components, random_state=context.seed), Normalizer(copy=False))
        means = KMeans(self.count, n_init=4, random_state=context.seed).fit(reduce.fit_transform(vectors))
        names = self._names(vectors, means.labels_, words.get_feature_names_out())
        found = means.predict(reduce.transform(words.transform(others))) if others else []
        return [names[c] for c in means.labels_], [names[c] for c in found]

    def _names(self, vectors: Any, labels: np.ndarray, vocabulary: np.ndarray) -> dict[int, str]:
        """Return names as `07 train, miles, speed`: the number, and the terms that weigh more here than overall."""
        overall = np.asarray(vectors.mean(axis=0)).ravel()
        names = {}
        for cluster in np.unique(labels):
            weights = np.asarray(vectors[labels == cluster].mean(axis=0)).ravel() - overall
            top = ", ".join(vocabulary[np.argsort(-weights, kind="stable")[: self.terms]])
            names[int(cluster)] = f"{cluster:02d} {top}"
        return names


@dataclass(frozen=True)
class ModelLabels:
    """A model chooses one of the given domains. A reply that names none of them gives no label.

    Args:
        names: the domains.
        writer: the model.
        prompt: text sent to the model; `{question}` and `{names}` (one per line) are replaced.
    """

    names: list[str]
    writer: WriterConfig
    prompt: str = (
        "Which one of these domains does the question belong to? Reply with the domain's name alone.\n\n{names}\n\n"
        "Question: {question}"
    )

    def __post_init__(self) -> None:
        check_prompt(self.prompt, "question", "names")
        if len({name.lower() for name in self.names}) < max(len(self.names), 1):
            raise ValueError(f"names is {self.names}; it must hold at least one domain, and none twice")

    def fingerprint(self) -> Any:
        return ["model", self.names, self.prompt, self.writer.fingerprint()]

    def label(self, pool: Sequence[str], others: Sequence[str], context: Context) -> tuple[list[str | None], ...]:
        names = "\n".join(self.names)
        prompts = [fill(self.prompt, question=question, names=names) for question in (*pool, *others)]
        known = {name.lower(): name for name in self.names}
        replies = ask(self.writer, prompts, context)
        labels = [known.get(reply.text.strip().strip("*.\"'` ").lower()) for reply in replies]
        return labels[: len(pool)], labels[len(pool) :]


@dataclass(frozen=True)
class LabellerConfig:
    """How domains are found; exactly one section is given.

    Args:
        clusters: by clustering, as {clusters: {count: 50}}.
        model: a model chooses one of given names, as {model: {names: [...], writer: {local: {model: DIR}}}}.
    """

    clusters: Clusters | None = None
    model: ModelLabels | None = None

    def __post_init__(self) -> None:
        one_section(self)

    @property
    def chosen(self) -> Labeller:
        """The labeller that is given."""
        return one_section(self)[1]


@stage("domains")
@dataclass(frozen=True)
class Domains(Stage):
    """Set `domain`; rows without a label are dropped.

    Args:
        labeller: how domains are found; null for the labels of the source.
        benchmark: evaluation sets whose questions are labelled too; `diverse` may draw domains as often as they occur
            there.
    """

    labeller: LabellerConfig | None = None
    benchmark: list[SourceConfig] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.benchmark and self.labeller is None:
            raise ValueError("benchmark needs a labeller; with given labels, give the stage `diverse` its weights")

    def inputs(self, context: Context) -> list[Any]:
        labeller = None if self.labeller is None else self.labeller.chosen.fingerprint()
        return [labeller, source_inputs(self.benchmark, context.root)]

    def apply(self, examples: list[Example], context: Context) -> Outcome:
        others = [question for source in self.benchmark for question in evaluation_questions(source, context)]
        labels: list[str | None] = [example.domain for example in examples]
        found: list[str | None] = []
        if self.labeller is not None:
            labels, found = self.labeller.chosen.label([example.question for example in examples], others, context)
        outcome = Outcome([])
        for example, name in zip(examples, labels, strict=True):
            if name is None:
                outcome.drops.append(context.drop(example, "no domain"))
            else:
                outcome.examples.append(replace(example, domain=name))
        outcome.facts["domains"] = dict(sorted(Counter(e.domain for e in outcome.examples if e.domain).items()))
        if self.benchmark:
            outcome.facts["benchmark"] = dict(sorted(Counter(name for name in found if name).items()))
            outcome.facts["benchmark without a domain"] = found.count(None)
        return outcome
