"""Bring a model here: fetch, import, store, publish, in that order, so that an interruption at any point leaves the model
as it was before.

Work happens in a folder that is swept when its process is gone; chunks are only published by the manifest, which is written
last and whole.  A pull of what is already here ends before any network is touched.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from shoal.errors import CorruptFileError, InvalidRequestError, UnsupportedModelError
from shoal.ids import Digest
from shoal.model.catalog import CatalogRef, Reference, parse_reference
from shoal.model.spec import ImportedModel, ModelSpec
from shoal.node.progress import Progress, Quiet
from shoal.node.sources import Obtained, default_name, fingerprint, obtain, release, settle_reference
from shoal.store.garbage import withdrawn_on_failure
from shoal.store.home import Store, missing_bytes, writing
from shoal.store.library import check_name
from shoal.store.manifest import Manifest, Origin
from shoal.store.tensor import dtype_name, stored_bytes
from shoal.store.write import external_tensors, write_model

QUANTISATIONS = ("fp32", "fp16", "bf16", "int8", "int4")

Importer = Callable[[Path, str, str | None], ImportedModel]
"""Path, name of the model and quantisation (None: the file's own numbers) to a model; raises what importers raise."""


class PullRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What to bring; `again` imports even what is here already."""

    reference: str
    name: str | None = None
    quantise: str | None = None
    again: bool = False


class Pulled(msgspec.Struct, frozen=True, kw_only=True):
    """A model that is here now; `was_here` tells that nothing had to be done."""

    name: str
    digest: Digest
    manifest: Manifest
    was_here: bool


def pull(store: Store, request: PullRequest, importer: Importer, progress: Progress | None = None) -> Pulled:
    """Have the model of *request* in *store*.

    Raises InvalidRequestError (reference, name, quantisation, unreadable or unsupported file), UnavailableError (network,
    pip, disk or quota) and UntrustedError (hash); the store is as before then.
    """
    progress = progress or Quiet()
    ref = settle_reference(parse_reference(request.reference))
    name = check_name(request.name or default_name(ref))
    if request.quantise not in {None, *QUANTISATIONS}:
        raise InvalidRequestError(
            f"{request.quantise!r} is no quantisation", hint=f"one of {', '.join(QUANTISATIONS)}", param="quantise"
        )
    with writing(store, name, waiting=lambda: progress.start(f"waiting for another pull of {name}")) as folder:
        origin = Origin(reference=str(ref), sha256=fingerprint(ref, progress), quantise=request.quantise or "")
        known = _known(store, name)
        _check_same_model(name, known, origin, again=request.again)
        if known is not None and known.origin == origin and not request.again and not missing_bytes(store, known):
            return Pulled(name=name, digest=store.library.digest(name), manifest=known, was_here=True)
        obtained = obtain(ref, store, folder, progress)
        with _released_if_useless(ref, store):
            imported = _completed(importer(obtained.path, name, request.quantise), ref, obtained)
        progress.start(
            "storing", sum(stored_bytes(dtype_name(t.data_type), t.dims) for t in external_tensors(imported.graph))
        )
        with withdrawn_on_failure(store, name):
            manifest = write_model(store, imported, origin=origin, written=progress.advance)
            digest = store.library.write(name, manifest)
        release(ref, store)
    return Pulled(name=name, digest=digest, manifest=manifest, was_here=False)


def _known(store: Store, name: str) -> Manifest | None:
    """The model of that name; a damaged manifest is as good as none, for the pull writes a new one."""
    with contextlib.suppress(CorruptFileError):
        return store.library.find(name)
    return None


def _check_same_model(name: str, known: Manifest | None, origin: Origin, *, again: bool) -> None:
    """Refuse to replace a model by one from elsewhere only because both files have the same name.

    Local files are named without their folder, so that only their bytes tell whether two are one.
    """
    if known is None or known.origin is None:
        return
    was = known.origin
    if was.reference != origin.reference:
        raise InvalidRequestError(
            f"a model {name!r} is here already, from {was.reference}",
            hint=f"choose another with --name, or `shoal rm {name}` first",
            param="name",
        )
    if origin.reference.startswith("file:") and was.sha256 != origin.sha256 and not again:
        raise InvalidRequestError(
            f"a model {name!r} is here already, from a {was.reference} with other bytes: SHA-256 {was.sha256[:16]}..., "
            f"that of this one is {origin.sha256[:16]}...",
            hint="choose another with --name, or replace it with `shoal pull --again`",
            param="name",
        )


@contextlib.contextmanager
def _released_if_useless(ref: Reference, store: Store) -> Iterator[None]:
    """A whole download that no importer takes will be refused the next time as well: do not keep it."""
    try:
        yield
    except (UnsupportedModelError, CorruptFileError):
        release(ref, store)
        raise


def _completed(imported: ImportedModel, ref: Reference, obtained: Obtained) -> ImportedModel:
    """Add what the importer cannot know: the source, the files from beside it, and the catalogue's facts."""
    spec: ModelSpec = msgspec.structs.replace(imported.spec, source=_source(ref))
    if isinstance(ref, CatalogRef):
        licence = ref.licence if spec.licence in {"", "unknown"} else spec.licence
        spec = msgspec.structs.replace(spec, licence=licence)
        if ref.pooling is not None and spec.pooling is None:
            spec = msgspec.structs.replace(spec, pooling=ref.pooling, normalise=ref.normalise)
    files = {**obtained.extras, **imported.files}
    return ImportedModel(spec=spec, graph=imported.graph, tensors=imported.tensors, files=files)


def _source(ref: Reference) -> str:
    """Where the bytes come from: of a catalogue's row, the package."""
    match ref:
        case CatalogRef(parcels=(first, *_)):
            return f"pypi:{first.package}=={first.version}"
        case _:
            return str(ref)
