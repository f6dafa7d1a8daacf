import av
import pytest
import torch

from mochi_core.errors import MochiError
from mochi_core.video_file import write_mp4


def frames(count, shade):
    return torch.full((count, 32, 48, 3), shade)


def test_pieces_become_one_video(tmp_path):
    path = tmp_path / "video.mp4"
    assert write_mp4(path, iter([frames(1, 0.0), frames(6, 1.0)]), fps=30) == 7
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (48, 32, 30)
        shades = [frame.to_ndarray(format="gray").mean() for frame in file.decode(stream)]
    assert len(shades) == 7
    assert shades[0] < 20 and min(shades[1:]) > 235


def test_frames_are_written_as_they_come(tmp_path):
    written = []

    def pieces():
        for _ in range(20):
            yield torch.rand(6, 32, 48, 3)
            written.append((tmp_path / ".video.mp4.part").exists())

    write_mp4(tmp_path / "video.mp4", pieces())
    # The encoder looks some frames ahead.
    assert written[-1] and not (tmp_path / ".video.mp4.part").exists()


def test_an_error_leaves_what_was_there(tmp_path):
    path = tmp_path / "video.mp4"
    path.write_bytes(b"older")

    def pieces():
        yield frames(1, 0.5)
        raise KeyError

    with pytest.raises(KeyError):
        write_mp4(path, pieces())
    assert [file.name for file in tmp_path.iterdir()] == ["video.mp4"]
    assert path.read_bytes() == b"older"


def test_no_frame(tmp_path):
    with pytest.raises(MochiError, match="The video has no frame"):
        write_mp4(tmp_path / "video.mp4", iter(()))
    assert not list(tmp_path.iterdir())


def test_metadata_is_kept(tmp_path):
    values = {"prompt": '{"text": "a \\"red\\" circle 🎈 圆"}', "workflow": "{}"}
    write_mp4(tmp_path / "out.mp4", [torch.rand(2, 16, 16, 3)], metadata=values, preset="veryfast")
    with av.open(str(tmp_path / "out.mp4")) as video:
        assert {name: video.metadata[name] for name in values} == values
