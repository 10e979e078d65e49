"""A draft model beside a first stage: whether it fits the model that it guesses for, its session, and the thread that asks it.

It is a whole model on the source's node, in the process of the first stage.  Nobody waits for it (ADR 20): what cannot be
foretold is answered as failed, and that sequence goes on without guesses of it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue

from structlog.typing import FilteringBoundLogger

from shoal.errors import InvalidRequestError, ShoalError
from shoal.ids import Digest
from shoal.model.gguf_tokenizer import TOKENIZER_FILE
from shoal.model.tokenizer import Tokenizer
from shoal.node.artifacts import load_shard, open_artifact
from shoal.runtime.effects import AskDraft, DraftDone
from shoal.runtime.ports import Backend, Session
from shoal.runtime.speculate.draft_model import go_on
from shoal.store.home import Store, read_file
from shoal.store.manifest import Manifest
from shoal.threads import Threads


def draft_for(store: Store, draft: str, model: str) -> Digest:
    """The version of the model called *draft*, if it can guess for *model*; raises InvalidRequestError, UnknownModelError."""
    digest = store.library.digest(draft)
    small, large = store.library.read(draft), store.library.read(model)
    if _file(small, TOKENIZER_FILE) == _file(large, TOKENIZER_FILE) != "":
        return digest
    guesses, knows = _tokenizer(store, small, draft), _tokenizer(store, large, model)
    if (guesses.pieces, guesses.special) != (knows.pieces, knows.special):
        same = sum(one == other for one, other in zip(guesses.pieces, knows.pieces, strict=False))
        raise InvalidRequestError(
            f"{draft} cannot guess for {model}: of its {len(guesses.pieces)} tokens {same} are those of {model}, "
            f"which has {len(knows.pieces)}",
            hint="a draft model must have the tokenizer of the model: take a smaller one of the same family",
            param="draft",
        )
    return digest


def _file(manifest: Manifest, name: str) -> str:
    return next((file.chunk.digest for file in manifest.files if file.name == name), "")


def _tokenizer(store: Store, manifest: Manifest, model: str) -> Tokenizer:
    found = {file.name: read_file(store.chunks, manifest, file.name) for file in manifest.files}
    try:
        return Tokenizer.from_files({name: data for name, data in found.items() if data is not None})
    except ShoalError as error:
        raise InvalidRequestError(
            f"{model} has no tokenizer that can be compared: {error.message}", hint=error.hint, param="draft"
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftModel:
    """A model that guesses, loaded; `context_tokens` positions in each slot."""

    session: Session
    context_tokens: int


def load_draft(
    store: Store, backend: Backend, digest: Digest, *, slots: int, context_tokens: int, threads: int
) -> DraftModel:
    """All blocks of the model in one session, with a slot for each of the stage's; raises ShoalError.

    It has half of the threads: the stage's own step runs beside it.
    """
    artifact = open_artifact(store, digest)
    limit = artifact.manifest.spec.context_tokens
    tokens = min(context_tokens, limit) if limit else context_tokens
    span = (0, len(artifact.blocks))
    shard = load_shard(store, artifact, span, slots=slots, context_tokens=tokens, threads=max(1, threads // 2))
    return DraftModel(session=backend.load(shard), context_tokens=tokens)


@dataclass(slots=True)
class DraftThread:
    """Asks the model what it is told to, one after another; *answered* is called on a thread of its own."""

    model: DraftModel
    answered: Callable[[DraftDone], None]
    threads: Threads
    log: FilteringBoundLogger
    failed: int = 0
    _asked: "SimpleQueue[AskDraft | None]" = field(default_factory=SimpleQueue)

    def start(self, name: str) -> None:
        """Begin to answer."""
        self.threads.start(name, self._run)

    def ask(self, ask: AskDraft) -> None:
        """Return at once; the answer comes when it is there."""
        self._asked.put(ask)

    def close(self) -> None:
        """Take nothing more; the session is closed when what is under way has ended."""
        self._asked.put(None)

    def _run(self) -> None:
        while (ask := self.threads.take(self._asked)) is not None:
            self.answered(self._foretold(ask))
        self.model.session.close()

    def _foretold(self, ask: AskDraft) -> DraftDone:
        try:
            return go_on(self.model.session, ask)
        except Exception as error:  # noqa: BLE001 whatever its engine makes of it, an answer goes on without guesses
            self.failed += 1
            if self.failed == 1:
                self.log.warning("draft.failed", error=f"{type(error).__name__}: {error}")
            return DraftDone(number=ask.number, failed=True)
