"""The grammars of a model that lies in the store: what a last stage asks which tokens may follow."""

from shoal.model.tokenizer import Tokenizer
from shoal.node.artifacts import Artifact
from shoal.runtime.backend.guided import GuidedGrammars
from shoal.store.home import Store, read_file


def grammars_of(store: Store, artifact: Artifact) -> GuidedGrammars:
    """Reads the model's tokenizer when the first grammar comes, and not before: most workers never need it."""
    manifest = artifact.manifest

    def read() -> Tokenizer:
        files = {f.name: read_file(store.chunks, manifest, f.name) for f in manifest.files}
        return Tokenizer.from_files({name: data for name, data in files.items() if data is not None})

    return GuidedGrammars(read, manifest.spec.vocabulary, manifest.spec.eos_token_ids)
