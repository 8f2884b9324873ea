"""Images: bit-equal to transformers' PIL processors, and no file of the image folder can hurt a run."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import resource
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoImageProcessor, CLIPImageProcessorPil, LlavaImageProcessorPil, SiglipImageProcessorPil

from llava_core.data.image_store import ImageStore
from llava_core.data.images import Aspect, ImageProcessor, exact_columns
from llava_core.errors import BadRow, ConfigError, DataError

SQUARE_336 = ImageProcessor(resize=336, crop=(336, 336))
EDGES: dict[str, Any] = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def reference(processor: object, image: Image.Image) -> torch.Tensor:
    return processor(image, return_tensors="pt")["pixel_values"][0]  # type: ignore[operator]


def expand_to_square(image: Image.Image) -> Image.Image:
    """The padding of the original LLaVA, by its definition: the image centred on a square of the mean colour."""
    side = max(image.size)
    levels = np.empty((side, side, 3), np.uint8)
    levels[:] = (122, 116, 104)
    top, left = (side - image.height) // 2, (side - image.width) // 2
    levels[top : top + image.height, left : left + image.width] = np.asarray(image)
    return Image.fromarray(levels)


sizes = st.tuples(st.integers(1, 700), st.integers(1, 700)).filter(lambda s: max(s) <= 60 * min(s))


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(0, 2**31))
@example((640, 480), 0)
@example((480, 640), 0)
@example((640, 427), 0)
@example((60, 1), 0)
@example((100, 3), 0)
@example((336, 336), 0)
def test_square_is_bit_equal_to_transformers_clip(size: tuple[int, int], seed: int) -> None:
    image = noise(*size, seed)
    assert torch.equal(SQUARE_336(image), reference(CLIPImageProcessorPil(**EDGES), image))


def columns(width: int, height: int) -> tuple[float, float] | None:
    return exact_columns(width, 336 * width // height, (336 * width // height - 336) // 2, 336)


@settings(max_examples=40, deadline=None)
@given(st.integers(15, 60), st.integers(0, 9), st.sampled_from([(4, 3), (3, 2), (5, 4), (2, 1), (7, 4), (8, 7)]))
def test_box_is_bit_equal_where_it_is_used(unit: int, seed: int, ratio: tuple[int, int]) -> None:
    width, height = unit * ratio[0], unit * ratio[1]
    assume(columns(width, height) is not None)
    image = noise(width, height, seed)
    assert torch.equal(SQUARE_336(image), reference(CLIPImageProcessorPil(**EDGES), image))


def test_without_the_fall_back_the_box_would_not_be_equal() -> None:
    """Why the box is used for some landscapes only: Pillow holds it in float32."""
    assert columns(640, 480) == (80.0, 560.0)
    assert columns(640, 427) is None
    image, box = noise(640, 427), (83 * 640 / 503, 0, (83 + 336) * 640 / 503, 427)
    plain = image.resize((503, 336), Image.Resampling.BICUBIC).crop((83, 0, 83 + 336, 336))
    assert plain.tobytes() != image.resize((336, 336), Image.Resampling.BICUBIC, box=box).tobytes()
    assert torch.equal(SQUARE_336(image), reference(CLIPImageProcessorPil(**EDGES), image))


@settings(max_examples=40, deadline=None)
@given(sizes, st.integers(0, 2**31))
@example((333, 500), 0)
@example((7, 1), 0)
@example((3, 8), 0)
def test_pad_is_bit_equal_to_transformers_llava_and_to_the_original(size: tuple[int, int], seed: int) -> None:
    image = noise(*size, seed)
    pixels = replace(SQUARE_336, aspect="pad")(image)
    assert torch.equal(pixels, reference(LlavaImageProcessorPil(do_pad=True, **EDGES), image))
    assert torch.equal(pixels, reference(CLIPImageProcessorPil(**EDGES), expand_to_square(image)))


@settings(max_examples=25, deadline=None)
@given(sizes, st.integers(0, 2**31))
def test_siglip_is_bit_equal_to_transformers(size: tuple[int, int], seed: int) -> None:
    image = noise(*size, seed)
    theirs = SiglipImageProcessorPil(size={"height": 96, "width": 64})
    ours = ImageProcessor.from_config(json.loads(theirs.to_json_string()))
    assert ours.crop is None
    assert ours.output_size == (96, 64)
    assert torch.equal(ours(image), reference(theirs, image))


configs = st.fixed_dictionaries(
    {
        "size": st.integers(8, 90),
        "crop_size": st.fixed_dictionaries({"height": st.integers(8, 120), "width": st.integers(8, 120)}),
        "resample": st.integers(0, 5),
        "rescale_factor": st.sampled_from([1 / 255, 1 / 127.5, 1.0]),
        "image_mean": st.lists(st.floats(0, 1), min_size=3, max_size=3),
        "image_std": st.lists(st.floats(0.01, 2), min_size=3, max_size=3),
        "do_pad": st.booleans(),
        "do_resize": st.booleans(),
        "do_rescale": st.booleans(),
        "do_normalize": st.booleans(),
        "default_to_square": st.booleans(),
    }
).filter(lambda config: config["do_normalize"] or not config["do_pad"])


@settings(max_examples=60, deadline=None)
@given(sizes, configs)
def test_any_config_is_bit_equal_to_transformers(size: tuple[int, int], config: dict[str, Any]) -> None:
    """Among them crops larger than the resized image, which are filled with black, and odd differences."""
    theirs = LlavaImageProcessorPil(**config)
    ours = ImageProcessor.from_config({**config, "image_processor_type": "LlavaImageProcessor"})
    assert ours == ImageProcessor.from_config(json.loads(theirs.to_json_string()))
    # Levels that are neither rescaled nor normalized stay whole numbers there, which the model would convert.
    assert torch.equal(ours(noise(*size)), reference(theirs, noise(*size)).float())


# Configs in the forms that towers' folders have.
HALF = [0.5, 0.5, 0.5]
CLIP_STATISTICS = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
SIGLIP = {
    "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": HALF, "image_std": HALF,
    "image_processor_type": "SiglipImageProcessor", "processor_class": "SiglipProcessor", "resample": 3,
    "rescale_factor": 0.00392156862745098,
}  # fmt: skip
TOWERS = {
    "clip_224_first_form": {
        "crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 224,
        "feature_extractor_type": "CLIPFeatureExtractor", **CLIP_STATISTICS,
    },
    "clip_224": {
        "crop_size": {"height": 224, "width": 224}, "do_center_crop": True, "do_convert_rgb": True,
        "do_normalize": True, "do_rescale": True, "do_resize": True, "feature_extractor_type": "CLIPFeatureExtractor",
        "image_processor_type": "CLIPImageProcessor", "resample": 3, "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": 224}, **CLIP_STATISTICS,
    },
    "siglip_224": {**SIGLIP, "size": {"height": 224, "width": 224}},
    "siglip_256_bilinear": {**SIGLIP, "size": {"height": 256, "width": 256}, "resample": 2},
    "siglip_so400m_384": {**SIGLIP, "size": {"height": 384, "width": 384}, "do_convert_rgb": None},
}  # fmt: skip


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("size", [(640, 480), (333, 500), (90, 70), (384, 384)])
def test_towers_of_other_sizes(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(TOWERS[name]))
    theirs = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert torch.equal(ImageProcessor.from_folder(tmp_path)(noise(*size)), reference(theirs, noise(*size)))


MODES = {"1": "png", "L": "png", "LA": "png", "P": "gif", "RGBA": "png", "CMYK": "jpg", "I;16": "png", "F": "tiff"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("aspect", ["square", "pad"])
def test_each_mode_equals_convert_rgb_then_the_reference(mode: str, aspect: Aspect, tmp_path: Path) -> None:
    name = f"image.{MODES[mode]}"
    source = noise(50, 40).convert("I") if mode == "I;16" else noise(50, 40)
    source.convert(mode).save(tmp_path / name)
    image = ImageStore(tmp_path, 10**6).open(name)
    with Image.open(tmp_path / name) as file:
        assert file.mode == mode
        expected = np.asarray(file.convert("RGB"))
    np.testing.assert_array_equal(np.asarray(image), expected)
    theirs = LlavaImageProcessorPil(do_pad=aspect == "pad", **EDGES)
    assert torch.equal(replace(SQUARE_336, aspect=aspect)(image), reference(theirs, Image.fromarray(expected)))


def test_transparency_of_a_palette_is_dropped_as_in_the_original(tmp_path: Path) -> None:
    noise(50, 40).convert("P").save(tmp_path / "a.png", transparency=7)
    image = ImageStore(tmp_path, 10**6).open("a.png")
    with Image.open(tmp_path / "a.png") as file:
        plain = Image.fromarray(np.asarray(file.convert("RGB")))
    assert torch.equal(SQUARE_336(image), reference(CLIPImageProcessorPil(**EDGES), plain))
    # and what the store returns gives the same in transformers, which blends such an image when it is marked as one
    assert torch.equal(SQUARE_336(image), reference(CLIPImageProcessorPil(**EDGES), image))


def test_exif_rotation_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(50, 40).save(tmp_path / "a.jpg", exif=exif)
    assert ImageStore(tmp_path, 10**6).open("a.jpg").size == (50, 40)


def test_processor_refuses_other_modes() -> None:
    with pytest.raises(ValueError, match="mode L, expected RGB"):
        SQUARE_336(Image.new("L", (4, 4)))


@pytest.mark.parametrize(("aspect", "size"), [("square", (1, 5000)), ("pad", (1, 20000))])
def test_extreme_aspect_ratio_is_refused_before_memory_is_used(aspect: Aspect, size: tuple[int, int]) -> None:
    with pytest.raises(BadRow, match="image_too_large") as caught:
        replace(SQUARE_336, aspect=aspect)(Image.new("RGB", size))
    assert f"{size[0]} x {size[1]}" in caught.value.message


def test_processor_survives_pickling_and_is_a_value() -> None:
    SQUARE_336(noise(8, 8))
    copy = pickle.loads(pickle.dumps(SQUARE_336))
    assert copy == SQUARE_336
    assert hash(copy) == hash(SQUARE_336)
    assert torch.equal(copy(noise(9, 8)), SQUARE_336(noise(9, 8)))


def test_import_does_not_import_transformers() -> None:
    code = "import sys, llava_core.data.images; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


PROCESSORS = [
    SQUARE_336,
    replace(SQUARE_336, aspect="pad"),
    ImageProcessor((64, 48), None, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    ImageProcessor((64, 48), None, aspect="pad"),
    ImageProcessor((64, 48), (40, 40), resample=2),
    ImageProcessor(30, (32, 31), rescale_factor=1 / 127.5, aspect="pad"),
    ImageProcessor(None, (32, 31)),
]


@pytest.mark.parametrize("processor", PROCESSORS)
def test_export_is_read_back_by_transformers_and_by_us(processor: ImageProcessor, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor.to_config()))
    assert ImageProcessor.from_folder(tmp_path) == processor
    theirs = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert torch.equal(processor(noise(75, 41)), reference(theirs, noise(75, 41)))
    theirs.save_pretrained(tmp_path / "again")
    assert ImageProcessor.from_folder(tmp_path / "again") == processor


CLASSIC = {
    "crop_size": 336, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 336,
    "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip
LLAVA_HF = {
    **EDGES, "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True, "do_rescale": True,
    "do_resize": True, "image_mean": [0.48145466, 0.4578275, 0.40821073], "processor_class": "LlavaProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711], "image_processor_type": "CLIPImageProcessor", "resample": 3,
    "rescale_factor": 0.00392156862745098, "pad_size": None, "device": None, "do_pad": None,
}  # fmt: skip


@pytest.mark.parametrize("config", [CLASSIC, LLAVA_HF, {"image_processor_type": "LlavaImageProcessorFast", **EDGES}])
def test_known_forms_of_one_config(config: dict[str, object]) -> None:
    assert ImageProcessor.from_config(config) == SQUARE_336


def test_defaults_are_those_of_transformers() -> None:
    for theirs in (CLIPImageProcessorPil(), LlavaImageProcessorPil(), SiglipImageProcessorPil()):
        short = {"image_processor_type": type(theirs).__name__}
        assert ImageProcessor.from_config(short) == ImageProcessor.from_config(json.loads(theirs.to_json_string()))


def test_do_pad_decides_unless_the_caller_does(tmp_path: Path) -> None:
    config = {"image_processor_type": "LlavaImageProcessor", "do_pad": True, **EDGES}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": config, "patch_size": 14}))
    assert ImageProcessor.from_folder(tmp_path).aspect == "pad"
    assert ImageProcessor.from_folder(tmp_path, aspect="square") == SQUARE_336


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"use_square_size": True}, "use_square_size"),
        ({"auto_map": {"AutoImageProcessor": "code.py"}}, "auto_map"),
        ({"pad_size": {"height": 1, "width": 1}}, "pad_size"),
        ({"do_pad": True}, "do_pad"),
        ({"do_resize": "no"}, "do_resize"),
        ({"do_resize": False, "do_center_crop": False}, "varying size"),
        ({"do_normalize": 1}, "do_normalize"),
        ({"data_format": "channels_last"}, "data_format"),
        ({"do_center_crop": "yes"}, "do_center_crop"),
        ({"crop_to_patches": True}, "crop_to_patches"),
        ({"do_center_crop": False}, "varying size"),
        ({"size": {"shortest_edge": 1, "longest_edge": 2}}, "longest_edge"),
        ({"size": 0}, "size"),
        ({"crop_size": {"shortest_edge": 1}}, "crop_size"),
        ({"resample": 9}, "resample"),
        ({"rescale_factor": "1/255"}, "rescale_factor"),
        ({"rescale_factor": float("nan")}, "rescale_factor"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std"),
        ({"image_processor_type": "LlavaImageProcessor", "do_pad": True, "image_mean": 122}, "colour"),
        ({"image_processor_type": "LlavaImageProcessor", "do_pad": True, "do_normalize": False}, "do_normalize"),
        ({"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": []}, "image_grid_pinpoints"),
        ({"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": [[336, 500]]}, "multiples"),
        ({"image_processor_type": "LlavaNextImageProcessor", "crop_size": {"height": 336, "width": 300}}, "square"),
        ({"image_processor_type": "LlavaNextImageProcessor", "do_resize": False}, "do_resize"),
        ({"image_processor_type": "LlavaNextImageProcessor", "do_center_crop": False, "crop_size": 224}, "crop_size"),
        ({"image_processor_type": "GotOcr2ImageProcessor"}, "do_center_crop=True of a GotOcr2ImageProcessor"),
        ({"image_processor_type": "SiglipImageProcessor", "crop_size": None}, "needs a crop_size"),
        ({"image_processor_type": "ViTImageProcessor"}, "ViTImageProcessor"),
        ({"image_processor_type": None, "feature_extractor_type": None}, "image_processor_type"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(change: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ImageProcessor.from_config({**LLAVA_HF, **change})


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_folder_without_a_usable_config(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(ConfigError, match=str(tmp_path)):
        ImageProcessor.from_folder(tmp_path)


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    root = tmp_path / "images"
    root.mkdir()
    for path in (root / "good.png", tmp_path / "secret.png"):
        noise(30, 20).save(path)
    return ImageStore(root, max_pixels=10_000)


def reason(store: ImageStore, name: str) -> str:
    with pytest.raises(BadRow) as caught:
        store.open(name)
    assert repr(name) in caught.value.message or caught.value.reason == "image_too_large"
    return caught.value.reason


def test_good_names(store: ImageStore, tmp_path: Path) -> None:
    (store.root / "sub").mkdir()
    (store.root / "link.png").symlink_to(store.root / "good.png")
    (tmp_path / "root_is_a_link").symlink_to(store.root)
    store = ImageStore(tmp_path / "root_is_a_link", 10_000)
    for name in ("good.png", "./good.png", "sub/../good.png", "link.png"):
        image = store.open(name)
        assert (image.mode, image.size) == ("RGB", (30, 20))
        np.testing.assert_array_equal(np.asarray(image), np.asarray(noise(30, 20)))


def test_nothing_outside_the_folder_is_read(store: ImageStore, tmp_path: Path) -> None:
    (store.root / "out.png").symlink_to(tmp_path / "secret.png")
    (store.root / "up").symlink_to(tmp_path)
    (tmp_path / "images2").mkdir()
    noise(3, 3).save(tmp_path / "images2" / "a.png")
    names = ("../secret.png", "x/../../secret.png", "out.png", "up/secret.png", "../images2/a.png", "..")
    for name in (*names, str(tmp_path / "secret.png"), str(store.root / "good.png")):
        assert reason(store, name) == "image_outside_folder"


def test_missing(store: ImageStore) -> None:
    with pytest.raises(DataError, match="not a folder"):
        ImageStore(store.root / "none", 100)
    for name in ("none.png", "good.png/x", "nul\0.png", "half\ud800.png"):
        assert reason(store, name) == "missing_image"


def test_not_a_readable_file(store: ImageStore) -> None:
    (store.root / "folder.png").mkdir()
    os.mkfifo(store.root / "pipe.png")
    (store.root / "loop.png").symlink_to("loop.png")
    (store.root / "text.png").write_text("hello")
    (store.root / "empty.png").write_bytes(b"")
    (store.root / "zero.gif").write_bytes(b"GIF89a" + struct.pack("<HHBBB", 0, 0, 0, 0, 0) + b";")
    (store.root / "zero.ppm").write_bytes(b"P6 0 5 255\n")
    noise(20, 20).save(store.root / "program.eps")  # Pillow would have Ghostscript run it
    names = ("folder.png", "pipe.png", "loop.png", "text.png", "empty.png", "zero.gif", "zero.ppm", "program.eps")
    for name in (*names, "", "a" * 300):
        assert reason(store, name) == "broken_image"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(store: ImageStore) -> None:
    (store.root / "good.png").chmod(0)
    assert reason(store, "good.png") == "broken_image"


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "tiff", "bmp"])
def test_truncated_files_are_broken(store: ImageStore, suffix: str) -> None:
    buffer = io.BytesIO()
    noise(60, 50).save(buffer, {"jpg": "JPEG"}.get(suffix, suffix.upper()))
    content = buffer.getvalue()
    for length in range(0, int(len(content) * 0.9), max(1, len(content) // 25)):
        (store.root / "cut").write_bytes(content[:length])
        assert reason(store, "cut") in ("broken_image", "image_too_large")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on what it can still read
@pytest.mark.parametrize("suffix", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM"])
def test_damaged_bytes_give_an_image_or_a_bad_row(store: ImageStore, suffix: str) -> None:
    buffer, rng = io.BytesIO(), random.Random(0)
    noise(30, 20).save(buffer, suffix)
    for _ in range(80):
        content = bytearray(buffer.getvalue())
        for _ in range(rng.randint(1, 6)):
            content[rng.randrange(min(len(content), 200))] = rng.randrange(256)
        (store.root / "damaged").write_bytes(content)
        try:
            assert store.open("damaged").mode == "RGB"
        except BadRow as error:
            assert error.reason in ("broken_image", "image_too_large")  # noqa: PT017


def png(width: int, height: int) -> bytes:
    """A black PNG of any size, without the rows beyond 13000."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    packer = zlib.compressobj(9)
    rows = b"".join([packer.compress(bytes(width + 1)) for _ in range(min(height, 13000))] + [packer.flush()])
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(13000, 13000), (40000, 40000), (101, 100)])
def test_bomb_is_refused_from_its_header(
    store: ImageStore, size: tuple[int, int], recwarn: pytest.WarningsRecorder
) -> None:
    (store.root / "bomb.png").write_bytes(png(*size))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadRow, match="image_too_large") as caught:
        store.open("bomb.png")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20 * 2**10  # KiB
    assert "10000" in caught.value.message
    assert str(size[0] * size[1]) in caught.value.message
    assert not [warning for warning in recwarn if "Decompression" in warning.category.__name__]
