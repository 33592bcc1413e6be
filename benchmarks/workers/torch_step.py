"""Trains torchvision's DenseNet-121 in PyTorch and answers commands: a process of `training_step.py`.

Its Python has torch and torchvision and nothing of this repository. Commands as in `keras_step.py`. The step leaves
out what only notebook 2's has, clipped gradients and averaged weights, and gets images of three channels, scaled.

Usage: torch_step.py SETUP, a JSON object of `side`, `batch` and `layout`, "channels_first" or "channels_last".
"""

import json
import sys
import time

import torch
import torchvision


def main():
    """Builds, takes the first step, and answers until there is no more to read."""
    setup = json.loads(sys.argv[1])
    torch.manual_seed(0)
    layout = torch.channels_last if setup["layout"] == "channels_last" else torch.contiguous_format
    model = torchvision.models.densenet121(num_classes=14).train().to(memory_format=layout)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, weight_decay=1e-3, fused=True)
    loss_of = torch.nn.BCEWithLogitsLoss()
    images = torch.randn(setup["batch"], 3, setup["side"], setup["side"]).to(memory_format=layout)
    labels = torch.randint(0, 2, (setup["batch"], 14)).float()

    def time_steps(calls):
        started, worked = time.perf_counter(), time.process_time()
        for _ in range(calls):
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(model(images), labels)
            loss.backward()
            optimizer.step()
        value = loss.item()
        seconds, cpu = time.perf_counter() - started, time.process_time() - worked
        return {"seconds": seconds / calls, "cpu": cpu / calls, "loss": value}

    def measure_peak(sizes=(1024, 2048, 4096), times=3):
        best = 0.0
        for size in sizes:
            matrix = torch.randn(size, size)
            for _ in range(times):
                started = time.perf_counter()
                torch.matmul(matrix, matrix)
                best = max(best, 2 * size**3 / (time.perf_counter() - started))
        return best

    time_steps(1)
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    print(json.dumps({"versions": versions, "threads": torch.get_num_threads()}), flush=True)
    commands = {"steps": time_steps, "peak": measure_peak}
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(commands[name](*arguments)), flush=True)


if __name__ == "__main__":
    main()
