"""With the extra `fid` installed: the real network, random weights, against torch-fidelity's own distances."""

import hashlib

import numpy as np
import pytest

from spread_jax.evaluation import Moments, features, frechet_distance, inception_features, kernel_distance

torch = pytest.importorskip("torch")
torch_fidelity = pytest.importorskip("torch_fidelity", reason='pip install "spread-jax[fid]"')
COUNT = 24


class Images(torch.utils.data.Dataset):
    """uint8 [3, height, width], as torch-fidelity reads them."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return torch.from_numpy(self.images[index].transpose(2, 0, 1).copy())


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights of the right names and shapes; the published file is a download of 91 MB."""
    extractor = torch_fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, path)
    shapes = {}

    def keep(network, _):
        shapes.update(network.state_dict())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractor, "load_state_dict", keep)
        extractor("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    chance = torch.Generator().manual_seed(0)
    draw = {
        4: lambda shape: torch.randn(shape, generator=chance) * (2 / shape[1:].numel()) ** 0.5,
        2: lambda shape: torch.randn(shape, generator=chance) * 0.02,
        1: lambda shape: 0.5 + torch.rand(shape, generator=chance),
    }
    torch.save({n: draw[v.ndim](v.shape) if v.is_floating_point() and v.ndim else v for n, v in shapes.items()}, path)
    return path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch-fidelity
def test_the_distances_are_those_of_torch_fidelity(weights, monkeypatch):
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 255, 48 * 48 * 3).reshape(48, 48, 3)
    p = rng.normal(ramp, 20, (COUNT, 48, 48, 3)).clip(0, 255).astype(np.uint8)
    q = rng.normal(ramp[::-1], 40, (COUNT, 48, 48, 3)).clip(0, 255).astype(np.uint8)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    monkeypatch.setattr(features, "_INCEPTION_DIGEST", digest[:8])
    extractor = inception_features(weights, batch_size=10)
    assert extractor.fingerprint == digest[:16]
    ours = [extractor(images) for images in (p, q)]
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(p), input2=Images(q), fid=True, kid=True, kid_subset_size=COUNT, kid_subsets=1, cuda=False,
        cache=False, verbose=False, batch_size=10, feature_extractor_weights_path=str(weights),
    )  # fmt: skip
    distance = frechet_distance(*map(Moments.of, ours))
    # Fewer images than dimensions: torch-fidelity's square root of a singular matrix is good to some 1e-5.
    np.testing.assert_allclose(distance, theirs["frechet_inception_distance"], rtol=1e-4)
    np.testing.assert_allclose(kernel_distance(*ours).value, theirs["kernel_inception_distance_mean"], rtol=1e-4)
