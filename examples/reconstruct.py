"""Converts checkpoints of the original release and runs a picture through them: pixels -> codes -> pixels.

    python examples/reconstruct.py                                   # with small reference checkpoints
    python examples/reconstruct.py photo.jpg --ta-tok ta_tok.pth --ar-detok ar_dtok_lp_256px.pth --vqvae vq_ds16_t2i.pt

The reference checkpoints have random weights, so what they draw is noise; the published ones draw the picture. What is
made of the reference lies in out/reference, and of your own checkpoints in out/ta-tok and out/ar-detok.
"""

import argparse
import lzma
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from tar_hf import ARDeTokForCausalLM, TATokImageProcessor, TATokModel
from tar_hf.conversion import convert_ar_detok, convert_ta_tok

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REFERENCE = Path(__file__).parents[1] / "tests" / "golden" / "published"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", nargs="?", type=Path, help="a picture; a red circle by default")
    parser.add_argument("--ta-tok", type=Path, help="ta_tok.pth")
    parser.add_argument("--ar-detok", type=Path, help="ar_dtok_*.pth")
    parser.add_argument("--vqvae", type=Path, help="vq_ds16_t2i.pt")
    parser.add_argument("--scale", type=int, default=1, help="1, 2 or 3: finer to coarser codes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=DEVICE, help="such as cuda:1; default: a CUDA GPU, or else the CPU")
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder for the repositories and the picture")
    arguments = parser.parse_args()

    sources = {"ta_tok": arguments.ta_tok, "ar_detok": arguments.ar_detok, "vqvae": arguments.vqvae}
    folder, vision_config = arguments.output, None
    if not any(sources.values()):
        folder = arguments.output / "reference"
        sources, vision_config = unpack_reference(folder), REFERENCE / "vision_config"
    elif not all(sources.values()):
        parser.error("pass --ta-tok, --ar-detok and --vqvae together")

    ta_tok_repo, detokenizer_repo = folder / "ta-tok", folder / "ar-detok"
    for repo in (ta_tok_repo, detokenizer_repo):
        if arguments.ta_tok and repo.exists():
            parser.error(f"{repo} exists, perhaps of other checkpoints: remove it or choose another --output")
    if not ta_tok_repo.exists():
        print(convert_ta_tok(sources["ta_tok"], ta_tok_repo, vision_config=vision_config))
    if not detokenizer_repo.exists():
        print(convert_ar_detok(sources["ar_detok"], detokenizer_repo, vqvae=sources["vqvae"]))

    processor = TATokImageProcessor.from_pretrained(ta_tok_repo)
    ta_tok = TATokModel.from_pretrained(ta_tok_repo, device_map=arguments.device).eval()
    detokenizer = ARDeTokForCausalLM.from_pretrained(detokenizer_repo, device_map=arguments.device).eval()
    picture = Image.open(arguments.image) if arguments.image else red_circle()
    with torch.inference_mode():
        values = processor(picture, return_tensors="pt").pixel_values.to(arguments.device)
        codes = ta_tok.encode(values, scale=arguments.scale)
        print(f"codes {tuple(codes.shape)}: {codes[0, :8].tolist()} ...")
        pixels = detokenizer.detokenize(ta_tok.decode(codes), generator=torch.Generator().manual_seed(arguments.seed))
    drawn = Image.fromarray((pixels[0] * 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy())
    drawn.save(arguments.output / "reconstruction.png")
    print(f"{arguments.output / 'reconstruction.png'}, {drawn.width} x {drawn.height}")


def unpack_reference(folder: Path) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    names = {"ta_tok": "ta_tok.pth", "ar_detok": "ar_dtok_128px.pth", "vqvae": "vq_ds16.pt"}
    for name in names.values():
        (folder / name).write_bytes(lzma.decompress((REFERENCE / f"{name}.xz").read_bytes()))
    return {kind: folder / name for kind, name in names.items()}


def red_circle() -> Image.Image:
    picture = Image.new("RGB", (400, 300), "white")
    ImageDraw.Draw(picture).ellipse((120, 70, 280, 230), fill="red")
    return picture


if __name__ == "__main__":
    main()
