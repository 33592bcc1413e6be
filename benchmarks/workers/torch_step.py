"""Trains torchvision's DenseNet-121 in PyTorch and answers commands: of `training_step.py`, or `gpu_step.py` on a GPU.

Its Python has torch and torchvision and nothing of this repository. Commands as in `keras_step.py`. The step leaves
out what only notebook 2's has, averaged weights, and gets images of three channels, scaled. On a GPU it computes in
bfloat16 by autocast, and each step gets its images from the host.

Usage: torch_step.py SETUP, a JSON object of `side`, `batch`, `layout`, "channels_first" or "channels_last", and for a
GPU `device`, "cuda", and `compiled`, true for torch.compile.
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
    device = setup.get("device", "cpu")
    model = torchvision.models.densenet121(num_classes=14).train().to(device, memory_format=layout)
    network = torch.compile(model) if setup.get("compiled") else model
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, weight_decay=1e-3, fused=True)
    loss_of = torch.nn.BCEWithLogitsLoss()
    images = torch.randn(setup["batch"], 3, setup["side"], setup["side"]).to(memory_format=layout)
    labels = torch.randint(0, 2, (setup["batch"], 14)).float()
    if device == "cuda":
        images, labels = images.pin_memory(), labels.pin_memory()

    def time_steps(calls):
        started, worked = time.perf_counter(), time.process_time()
        for _ in range(calls):
            optimizer.zero_grad(set_to_none=True)
            seen, wanted = (array.to(device, non_blocking=True) for array in (images, labels))
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = loss_of(network(seen), wanted)
            loss.backward()
            optimizer.step()
        value = loss.item()
        seconds, cpu = time.perf_counter() - started, time.process_time() - worked
        return {"seconds": seconds / calls, "cpu": cpu / calls, "loss": value}

    def measure_gpu(size=8192, times=20):
        matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16)
        torch.matmul(matrix, matrix)
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(times):
            torch.matmul(matrix, matrix)
        torch.cuda.synchronize()
        return 2 * size**3 * times / (time.perf_counter() - started)

    def measure_peak(sizes=(1024, 2048, 4096), times=3):
        best = 0.0
        for size in sizes:
            matrix = torch.randn(size, size)
            for _ in range(times):
                started = time.perf_counter()
                torch.matmul(matrix, matrix)
                best = max(best, 2 * size**3 / (time.perf_counter() - started))
        return best

    time_steps(2)  # compiles, where it does
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    print(json.dumps({"versions": versions, "threads": torch.get_num_threads()}), flush=True)
    commands = {"steps": time_steps, "peak": measure_gpu if device == "cuda" else measure_peak}
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(commands[name](*arguments)), flush=True)


if __name__ == "__main__":
    main()
