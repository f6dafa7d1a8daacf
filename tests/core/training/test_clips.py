from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from mochi_core.errors import DatasetError, ShapeError
from mochi_core.shapes import VideoSize
from mochi_core.training import clips
from mochi_core.training.clips import Look, choose_size, look_at, parse_size, read_pixels, shown

TICK = Fraction(1, 15360)


def write(path, pictures, times=None, codec="libx264", tick=TICK, fps=30, prepare=lambda stream: None, options=None):
    """A video of pictures, `H W 3` uint8, each shown from its time in seconds on."""
    times = [Fraction(n, fps) for n in range(len(pictures))] if times is None else times
    with av.open(str(path), "w", options=options or {}) as file:
        stream = file.add_stream(codec, rate=fps)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = {"gif": "rgb8"}.get(codec, "yuv420p")
        if codec == "libx264":
            stream.options = {"crf": "4", "preset": "ultrafast"}
        stream.codec_context.time_base = tick
        prepare(stream)
        for picture, time in zip(pictures, times):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=stream.pix_fmt)
            frame.pts, frame.time_base = round(time / tick), tick
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def grey(shade, height=64, width=64):
    return np.full((height, width, 3), shade, np.uint8)


def ramp(count, step=5, **shape):
    return [grey(20 + step * n, **shape) for n in range(count)]


def numbers(pixels, step=5):
    """Which pictures of a ramp they are."""
    return [round((float(frame.float().mean()) - 20) / step) for frame in pixels.frames]


def quarters(height=64, width=96):
    """Red, green, blue and white, from the upper left, row by row."""
    picture = np.zeros((height, width, 3), np.uint8)
    up, left = height // 2, width // 2
    picture[:up, :left, 0] = picture[:up, left:, 1] = picture[up:, :left, 2] = 255
    picture[up:, left:] = 255
    return picture


def corners(frame):
    """The colours in the middle of each quarter, as letters."""
    height, width = frame.shape[:2]
    names = {(1, 0, 0): "r", (0, 1, 0): "g", (0, 0, 1): "b", (1, 1, 1): "w"}
    middle = [(y, x) for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]
    return "".join(names.get(tuple((frame[y, x] > 128).int().tolist()), "?") for y, x in middle)


# What is seen when


@pytest.mark.parametrize(
    "fps, expected",
    [(30, [0, 1, 2, 3]), (60, [0, 2, 4, 6]), (15, [0, 0, 1, 1]), (24, [0, 0, 1, 2])],
)
def test_frames_of_other_rates(fps, expected):
    frames = ((Fraction(n, fps), Fraction(1, fps), n) for n in range(100))
    assert [frame for frame, _ in zip(shown(frames, Fraction(0)), range(4))] == expected


def test_the_last_frame_is_seen_as_long_as_it_lasts():
    frames = [(Fraction(5), Fraction(1, 10), "a"), (Fraction(51, 10), Fraction(2, 30), "b")]
    assert list(shown(frames, Fraction(0))) == [*"aaabb"]


def test_times_rounded_to_milliseconds_lose_no_frame():
    frames = [(Fraction(round(1000 * n / 30), 1000), Fraction(33, 1000), n) for n in range(60)]
    assert list(shown(frames, Fraction(1, 2000))) == list(range(60))


def test_a_video_of_30_fps_is_read_frame_by_frame(tmp_path):
    path = write(tmp_path / "a.mp4", ramp(13))
    assert look_at(path, 999) == Look(64, 64, 13)
    assert numbers(read_pixels(path, VideoSize(64, 64, 13))) == list(range(13))


def test_a_later_window(tmp_path):
    path = write(tmp_path / "a.mp4", ramp(20))
    assert numbers(read_pixels(path, VideoSize(64, 64, 7), 7)) == list(range(7, 14))


def test_variable_frame_rate(tmp_path):
    # Pictures 0, 1 and 2 are seen for 1, 4 and 2 frames of 30 fps; picture 3 comes between two of them.
    times = [Fraction(0), Fraction(1, 30), Fraction(5, 30), Fraction(7, 30) - Fraction(1, 90), Fraction(8, 30)]
    path = write(tmp_path / "a.mp4", ramp(5, 20), times)
    with av.open(str(path)) as file:
        assert [frame.time for frame in file.decode(video=0)] == pytest.approx([float(t) for t in times], abs=1e-4)
    assert numbers(read_pixels(path, VideoSize(64, 64, 7)), 20) == [0, 1, 1, 1, 1, 2, 2]
    assert look_at(path, 999).frames == 9


def test_webm_keeps_every_frame(tmp_path):
    path = write(tmp_path / "a.webm", ramp(13, 15), codec="libvpx", tick=Fraction(1, 1000))
    assert look_at(path, 999).frames == 13
    assert numbers(read_pixels(path, VideoSize(64, 64, 13)), 15) == list(range(13))


def test_gif(tmp_path):
    path = write(tmp_path / "a.GIF", ramp(5, 40), codec="gif", tick=Fraction(1, 100), fps=10, options={"loop": "0"})
    assert look_at(path, 999).frames == 15
    assert numbers(read_pixels(path, VideoSize(64, 64, 13)), 40) == [n // 3 for n in range(13)]


def test_no_more_is_looked_at_than_needed(tmp_path):
    path = write(tmp_path / "a.mp4", [grey(0, 16, 16)] * 300)
    assert 7 < look_at(path, 7).frames < 100
    assert look_at(path, 7).damage is None


# What the picture becomes


@pytest.mark.parametrize("height, width", [(60, 122), (122, 60), (46, 46), (300, 280)])
def test_any_picture_covers_the_size(tmp_path, height, width):
    path = write(tmp_path / "a.mp4", [grey(200, height, width)])
    frame = read_pixels(path, VideoSize(64, 48, 1)).frames[0]
    assert frame.shape == (48, 64, 3) and frame.float().min() > 195


def test_an_odd_size(tmp_path):
    def odd(stream):
        stream.pix_fmt = "yuv444p"

    path = write(tmp_path / "a.mp4", [quarters(51, 77)], prepare=odd)
    look = look_at(path, 1)
    assert (look.width, look.height) == (77, 51)
    assert corners(read_pixels(path, VideoSize(64, 48, 1)).frames[0]) == "rgbw"


def test_the_middle_is_kept(tmp_path):
    picture = grey(0, 64, 192)
    picture[:, 64:128] = 255
    path = write(tmp_path / "a.mp4", [picture])
    assert read_pixels(path, VideoSize(64, 64, 1)).frames[0, :, 4:-4].float().min() > 240


def test_fine_stripes_become_grey_instead_of_patterns(tmp_path):
    picture = grey(0, 256, 256)
    picture[:, ::2] = 255
    path = write(tmp_path / "a.mp4", [picture])
    inner = read_pixels(path, VideoSize(48, 48, 1)).frames[0, 4:-4, 4:-4].float()
    assert inner.std() < 8 and 100 < inner.mean() < 155


def test_pixels_that_are_not_square(tmp_path):
    def wide(stream):
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)

    picture = grey(0, 64, 64)
    picture[:, 16:48] = 255  # seen 128 wide, the white in the middle half of it
    path = write(tmp_path / "a.mp4", [picture], prepare=wide)
    look = look_at(path, 1)
    assert (look.width, look.height) == (128, 64)
    assert read_pixels(path, VideoSize(64, 64, 1)).frames[0, :, 4:-4].float().min() > 240


# A file's matrix takes the point (x, y) of the stored picture, y downwards, to (a x + c y, b x + d y) of the seen one.
TURNED = {"none": (1, 0, 0, 1), "right": (0, 1, -1, 0), "over": (-1, 0, 0, -1), "left": (0, -1, 1, 0)}


@pytest.mark.skipif(not hasattr(av.video.stream.VideoStream, "set_display_matrix"), reason="this PyAV cannot write it")
@pytest.mark.parametrize("way, expected", [("none", "rgbw"), ("right", "brwg"), ("over", "wbgr"), ("left", "gwrb")])
def test_rotation(tmp_path, way, expected):
    a, b, c, d = (number << 16 for number in TURNED[way])

    def turn(stream):
        stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])

    path = write(tmp_path / "a.mp4", [quarters()], prepare=turn)
    with av.open(str(path)) as file:
        assert abs(next(file.decode(video=0)).rotation) == {"none": 0, "over": 180}.get(way, 90), "the file says it"
    look, upright = look_at(path, 1), way in ("none", "over")
    assert (look.width, look.height) == ((96, 64) if upright else (64, 96))
    size = VideoSize(96, 64, 1) if upright else VideoSize(64, 96, 1)
    assert corners(read_pixels(path, size).frames[0]) == expected


@pytest.mark.parametrize("height, matrix", [(720, "itu709"), (480, "itu601")])
def test_colours_that_are_not_said_are_those_of_the_height(tmp_path, height, matrix):
    path, green = tmp_path / "a.mp4", np.zeros((height, 640, 3), np.uint8)
    green[..., 1] = 200
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = height, 640, "yuv420p"
        frame = av.VideoFrame.from_ndarray(green, format="rgb24").reformat(format="yuv420p", dst_colorspace=matrix)
        frame.colorspace = 2
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    middle = read_pixels(path, VideoSize(64, 64, 1)).frames[0, 32, 32].int().tolist()
    assert middle == pytest.approx([0, 200, 0], abs=6)


@pytest.mark.parametrize("curve, name", [(16, "smpte2084"), (18, "arib-std-b67")])
def test_hdr_is_refused(tmp_path, curve, name):
    def hdr(stream):
        stream.codec_context.color_trc = curve

    path = write(tmp_path / "a.mp4", ramp(7), prepare=hdr)
    with pytest.raises(DatasetError, match=f"a.mp4 is HDR, .*{name}.* tone mapping"):
        look_at(path, 7)


# What cannot be read


@pytest.mark.parametrize("content", [b"", b"no video at all", bytes(5000)])
def test_no_video(tmp_path, content):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"a\.mp4 cannot be read"):
        look_at(path, 7)


def test_sound_alone(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 44100
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    with pytest.raises(DatasetError, match="there is no video in it"):
        look_at(path, 7)


def test_a_truncated_video(tmp_path):
    noise = [np.random.default_rng(n).integers(0, 255, (64, 64, 3), np.uint8) for n in range(40)]
    path = write(tmp_path / "a.mp4", noise, options={"movflags": "faststart"})
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    look = look_at(path, 999)
    assert 10 < look.frames < 30 and look.damage
    pixels = read_pixels(path, VideoSize(64, 64, 37))
    assert 10 < len(pixels.frames) < 30
    path.write_bytes(content[:300])
    with pytest.raises(DatasetError, match=r"a\.mp4 cannot be read"):
        look_at(path, 999)


def test_an_error_while_decoding_leaves_what_came_before(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", ramp(13))
    crop, count = clips._cropped, []

    def failing(*arguments):
        count.append(1)
        if len(count) > 9:
            raise av.error.InvalidDataError(1, "broken here")
        return crop(*arguments)

    monkeypatch.setattr(clips, "_cropped", failing)
    pixels = read_pixels(path, VideoSize(64, 64, 13))
    assert len(pixels.frames) == 9 and pixels.damage == "broken here"


def test_a_long_video_is_never_there_as_a_whole(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", ramp(40))
    crop, count = clips._cropped, []
    monkeypatch.setattr(clips, "_cropped", lambda *a: count.append(1) or crop(*a))
    assert read_pixels(path, VideoSize(64, 64, 7), 3).frames.shape == (7, 64, 64, 3)
    assert len(count) == 7, "only what is kept is scaled"
    count.clear()
    path = write(tmp_path / "b.mp4", ramp(10), fps=15)
    assert len(read_pixels(path, VideoSize(64, 64, 13)).frames) == 13
    assert len(count) == 7, "what is seen twice is scaled once"


# Sizes

WIDE, TALL = VideoSize(96, 64, 13), VideoSize(64, 96, 13)


@pytest.mark.parametrize(
    "look, sizes, chosen",
    [
        (Look(1920, 1080, 50), (TALL, WIDE), WIDE),
        (Look(1080, 1920, 50), (WIDE, TALL), TALL),
        (Look(96, 64, 50), (WIDE, VideoSize(96, 64, 37), VideoSize(64, 64, 49)), VideoSize(96, 64, 37)),
        (Look(96, 64, 36), (WIDE, VideoSize(96, 64, 37)), WIDE),
        (Look(960, 640, 50), (WIDE, VideoSize(192, 128, 13)), VideoSize(192, 128, 13)),
        (Look(96, 64, 50), (WIDE, VideoSize(192, 128, 13)), WIDE),
        (Look(48, 32, 50), (VideoSize(192, 128, 13), WIDE), WIDE),
        # 848 x 480 is 16:9 but for the grid.
        (Look(1920, 1080, 40), (VideoSize(1024, 576, 7), VideoSize(848, 480, 37)), VideoSize(848, 480, 37)),
    ],
)
def test_the_size_that_fits(look, sizes, chosen):
    assert choose_size(look, sizes) == chosen


def test_too_short():
    with pytest.raises(DatasetError, match=r"It has 12 frames at 30 fps: it needs 13 for 96 x 64. Give a shorter size"):
        choose_size(Look(96, 64, 12), (VideoSize(96, 64, 19), WIDE))


def test_a_strip():
    with pytest.raises(DatasetError, match="2000 x 10"):
        choose_size(Look(2000, 10, 99), (WIDE,))


def test_sizes_in_words():
    assert parse_size("848x480x37") == VideoSize(848, 480, 37) == parse_size("848X480X37")
    for text in ("848x480", "ax480x37", "-16x16x1", "", "1e3x16x1"):
        with pytest.raises(DatasetError, match="width x height x frames"):
            parse_size(text)
    with pytest.raises(ShapeError):
        parse_size("850x480x37")


def test_pixels_are_bytes(tmp_path):
    assert read_pixels(write(tmp_path / "a.mp4", ramp(1)), VideoSize(64, 64, 1)).frames.dtype == torch.uint8
