"""Converts, loads and runs TA-Tok and AR-DTok LP at full size with random weights; prints time and peak memory.

    python benchmarks/full_size.py [--folder DIR] [--dtype float32|bfloat16] [--json FILE]

Every step is a process of its own, so that its peak is its own: the largest resident set, memory-mapped pages of the
files included. Needs about 11 GB on the disk (5.5 GB of them stay in --folder, if given) and 6 GB of memory.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from memory import peak_bytes

STEPS = {
    "import only": "",
    "convert ta-tok": "from tar_hf.conversion import convert_ta_tok; convert_ta_tok('ta_tok.pth', 'ta_tok')",
    "load ta-tok, encode and decode one image": """
import time, torch
from tar_hf import TATokModel
start = time.perf_counter()
model = TATokModel.from_pretrained("ta_tok", dtype=DTYPE).eval()
print("  loaded", time.perf_counter() - start)
pixels = torch.rand(1, 3, 384, 384, generator=torch.Generator().manual_seed(0)) * 2 - 1
with torch.inference_mode():
    for scale in (1, 1, 2, 3):
        start = time.perf_counter()
        codes = model.encode(pixels, scale=scale)
        middle = time.perf_counter()
        features = model.decode(codes)
        print("  scale", scale, "encode", middle - start, "decode", time.perf_counter() - middle, tuple(features.shape))
        assert codes.shape == (1, model.config.num_tokens(scale)) and features.isfinite().all()
""",
    "convert ar-detok lp": """
from tar_hf.conversion import convert_ar_detok
convert_ar_detok("ar_dtok_lp_256px.pth", "ar_dtok", vqvae="vq_ds16_t2i.pt")
""",
    "load ar-detok lp, draw one image at scale 3": """
import time, torch
from tar_hf import ARDeTokForCausalLM
start = time.perf_counter()
model = ARDeTokForCausalLM.from_pretrained("ar_dtok", dtype=DTYPE).eval()
print("  loaded", time.perf_counter() - start)
features = torch.randn(1, 81, 1152, generator=torch.Generator().manual_seed(0))
start = time.perf_counter()
pixels = model.detokenize(features, generator=torch.Generator().manual_seed(0))
print("  drawn", time.perf_counter() - start, tuple(pixels.shape))
assert pixels.shape == (1, 3, 256, 256) and pixels.isfinite().all()
""",
}
SOURCES = {"convert ta-tok": ["ta_tok.pth"], "convert ar-detok lp": ["ar_dtok_lp_256px.pth", "vq_ds16_t2i.pt"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keeps the synthetic checkpoints for the next run")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also writes the figures there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        sources = arguments.folder or Path(temporary)
        sources.mkdir(parents=True, exist_ok=True)
        for name in ("ta_tok.pth", "ar_dtok_lp_256px.pth", "vq_ds16_t2i.pt"):
            if not (sources / name).exists():
                # In another process: the memory of this one would count as its children's peak.
                subprocess.run([sys.executable, Path(__file__).with_name("synthetic.py"), sources / name], check=True)
            if sources != Path(temporary):
                (Path(temporary) / name).symlink_to((sources / name).resolve())
        figures = {}
        for step, code in STEPS.items():
            imports = "import torch, transformers, tar_hf.modeling, tar_hf.conversion\n"
            seconds, peak = measure(imports + code.replace("DTYPE", f"torch.{arguments.dtype}"), temporary)
            size = sum((sources / name).stat().st_size for name in SOURCES.get(step, []))
            ratio = f", {peak / size:.2f} x the source's {size / 2**30:.2f} GiB" if size else ""
            print(f"{step}: {seconds:.1f} s, peak {peak / 2**30:.2f} GiB{ratio}", flush=True)
            figures[step] = {"seconds": seconds, "peak_bytes": peak, "source_bytes": size or None}
    if arguments.json:
        arguments.json.write_text(json.dumps({"dtype": arguments.dtype, "steps": figures}, indent=2) + "\n")


def measure(code: str, folder: str) -> tuple[float, int]:
    """Seconds and largest resident set in bytes of a Python process that runs `code` in `folder`."""
    start = time.perf_counter()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=folder, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed with status {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - start, peak_bytes(usage)


if __name__ == "__main__":
    main()
