"""A process that times the cases of one stage when it is told to: python worker.py MODULE OPTIONS, told by lines.

It answers each line with one of JSON: at first the names of its cases, then for a name the seconds of one run, and for
an empty line its peak memory in bytes, and ends.
"""

import importlib
import json
import os
import sys

from memory import peak_bytes

answers, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr  # what libraries print is no answer


def answer(value):
    print(json.dumps(value), file=answers, flush=True)


def main():
    module, options = sys.argv[1], json.loads(sys.argv[2])
    sys.path[:0] = options["path"]
    import torch

    torch.set_num_threads(options["threads"])
    with torch.no_grad():
        cases = importlib.import_module(module).STAGES[options["stage"]](options)
        answer(list(cases))
        for line in sys.stdin:
            if not line.strip():
                break
            answer(cases[line.strip()]())
    on_gpu = torch.device(options.get("device", "cpu")).type == "cuda"
    answer(torch.cuda.max_memory_allocated() if on_gpu else peak_bytes())


if __name__ == "__main__":
    main()
