import pytest
import torch
from safetensors.torch import load_file, save_file

from mochi_core.errors import LatentsError
from mochi_core.latents_file import read_latents, write_latents


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_there_and_back(tmp_path, dtype):
    latents = torch.randn(1, 12, 3, 4, 6).to(dtype)
    write_latents(tmp_path / "a.latent", latents)
    assert torch.equal(read_latents(tmp_path / "a.latent"), latents.float())


def test_it_is_as_the_host_has_it(tmp_path):
    write_latents(tmp_path / "a.latent", torch.zeros(1, 12, 1, 2, 2))
    assert load_file(tmp_path / "a.latent").keys() == {"latent_tensor", "latent_format_version_0"}


@pytest.mark.parametrize(
    "content",
    [{"latent_tensor": torch.zeros(1, 4, 8, 8), "latent_format_version_0": torch.empty(0)}, {"x": torch.zeros(1)}],
)
def test_files_of_something_else(tmp_path, content):
    save_file(content, tmp_path / "a.latent")
    with pytest.raises(LatentsError, match=r"a.latent holds no latents of a video"):
        read_latents(tmp_path / "a.latent")


def test_broken_files(tmp_path):
    (tmp_path / "a.latent").write_bytes(b"12345678")
    with pytest.raises(LatentsError, match=r"a.latent cannot be read"):
        read_latents(tmp_path / "a.latent")
