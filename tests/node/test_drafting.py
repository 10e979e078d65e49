"""A draft model beside a first stage: which one may guess for which, and what becomes of one that fails."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest
from structlog.typing import FilteringBoundLogger
from tests.scenarios.conftest import make_tiny

from shoal.errors import InvalidRequestError, UnknownModelError
from shoal.ids import RequestId
from shoal.model.spec import INPUT_IDS, LOGITS
from shoal.node.drafting import DraftModel, DraftThread, draft_for, load_draft
from shoal.node.importing import import_files
from shoal.node.progress import Quiet
from shoal.node.pull import PullRequest, pull
from shoal.runtime.backend.onnx import OnnxBackend
from shoal.runtime.effects import AskDraft, DraftDone
from shoal.runtime.ports import SequenceStep
from shoal.runtime.request import Array
from shoal.runtime.speculate.draft_model import go_on
from shoal.store.home import Store, open_store
from shoal.threads import SystemThreads


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, golden: Path) -> Iterator[Store]:
    """Models `large` and `small` with one tokenizer, `foreign` with another, `mute` with none."""
    base = tmp_path_factory.mktemp("models")
    make_tiny(base / "large", layers=3)
    make_tiny(base / "small", layers=1)
    described = make_tiny(base / "foreign", layers=1) / "tokenizer.json"
    told = json.loads(described.read_text())
    vocabulary = told["model"]["vocab"]
    one, other = list(vocabulary)[100:102]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    described.write_text(json.dumps(told))
    opened = open_store(base / "home")
    for name, path in (
        ("large", base / "large"),
        ("small", base / "small"),
        ("foreign", base / "foreign"),
        ("mute", golden / "llama"),
    ):
        pull(opened, PullRequest(reference=str(path), name=name), import_files, Quiet())
    return opened


def test_a_model_with_the_same_tokenizer_may_guess(store: Store) -> None:
    assert draft_for(store, "small", "large") == store.library.digest("small")


@pytest.mark.parametrize(
    ("draft", "said"), [("foreign", "tokens .* are those of large"), ("mute", "no tokenizer that can be compared")]
)
def test_a_model_of_other_tokens_is_refused_with_the_reason(store: Store, draft: str, said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said) as refused:
        draft_for(store, draft, "large")
    assert refused.value.param == "draft"


def test_a_model_that_is_not_here_is_named(store: Store) -> None:
    with pytest.raises(UnknownModelError):
        draft_for(store, "nothing", "large")


def ask(number: int, ids: Sequence[int] = (5, 6, 7), start: int = 0, count: int = 2) -> AskDraft:
    return AskDraft(number=number, request=RequestId("a"), slot=0, start=start, ids=tuple(ids), count=count)


def test_it_is_a_whole_model_that_goes_on_by_itself(store: Store, log: FilteringBoundLogger) -> None:
    digest = store.library.digest("small")
    model = load_draft(store, OnnxBackend(), digest, slots=2, context_tokens=64, threads=1)
    heard: SimpleQueue[DraftDone] = SimpleQueue()
    thread = DraftThread(model, heard.put, SystemThreads(), log)
    thread.start("draft")

    thread.ask(ask(1, count=4))
    thread.ask(ask(2, count=4))
    first, second = heard.get(timeout=20), heard.get(timeout=20)
    thread.close()

    assert (model.context_tokens, first.number, second.number) == (64, 1, 2)
    assert len(first.ids) == 4
    assert first.ids == second.ids, "wrong guesses are rolled back by beginning below them"


class Failing:
    """An engine that fails at the steps that *fails* names."""

    def __init__(self, fails: Callable[[int], bool]) -> None:
        self.steps, self.closed = 0, False
        self._fails = fails

    def step(self, sequences: Sequence[SequenceStep], tensors: Mapping[str, Array]) -> dict[str, Array]:
        self.steps += 1
        if self._fails(self.steps):
            raise RuntimeError("out of range")
        logits = np.zeros((1, 9), np.float32)
        logits[0, (int(tensors[INPUT_IDS][0, -1]) + 1) % 9] = 1
        return {LOGITS: logits}

    def copy(self, source: int, target: int, count: int) -> None: ...
    def release(self, slot: int) -> None: ...
    def close(self) -> None:
        self.closed = True


def test_what_cannot_be_foretold_is_answered_as_failed_and_the_next_is_foretold(log: FilteringBoundLogger) -> None:
    session, heard = Failing(lambda step: step == 1), SimpleQueue[DraftDone]()
    thread = DraftThread(DraftModel(session=session, context_tokens=9), heard.put, SystemThreads(), log)
    thread.start("draft")

    thread.ask(ask(1))
    thread.ask(ask(2))

    assert heard.get(timeout=5) == DraftDone(number=1, failed=True)
    assert heard.get(timeout=5) == DraftDone(number=2, ids=(8, 0))
    thread.close()
    while not session.closed:
        thread.threads.sleep(0.01)
    assert thread.failed == 1
    assert go_on(session, ask(3, count=0)).ids == ()
