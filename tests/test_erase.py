import torch

from ldm.config.concepts import get_concept, watermark_prompts
from ldm.erasure.erase import solve_null_spaces
from ldm.erasure.null_space import NullSpaceBasis
from ldm.io.paths import ArtifactPaths


def test_bases_found_together_are_those_found_alone(tiny, tmp_path):
    concepts = [get_concept("style", index) for index in (0, 1, 2, 7)]  # of which the last one is not protected for the others
    store = ArtifactPaths(tmp_path, "SRS-ME", "tiny", "style", 1, 0)
    for concept, basis in solve_null_spaces(tiny, store, concepts, [0, 1, 2, 3], 1e-5, "svd", 1, always=3.0):
        others = [get_concept("style", index) for index in (0, 1, 2, 3) if index != concept.index]
        prompts = ["", *watermark_prompts(), *(text for other in others for text in (other.prompt, other.captions[0]))]
        assert basis.metadata["protected"] == prompts
        rows = tiny.encode_prompt(prompts).double()
        rows[:3] *= 3
        alone = NullSpaceBasis.solve(rows, prompts, 1e-5, "svd", {})
        assert basis.metadata["rank"] == alone.metadata["rank"]
        assert torch.allclose(basis.vectors.T @ basis.vectors, alone.vectors.T @ alone.vectors, atol=1e-6)
        assert torch.allclose(basis.protected.T @ basis.protected, alone.protected.T @ alone.protected, atol=1e-4)
        kept = NullSpaceBasis.load(store.basis(concept.index))
        assert torch.equal(kept.vectors, basis.vectors) and torch.equal(kept.protected, basis.protected)
