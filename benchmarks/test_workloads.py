"""Every workload of every spec, in a group a pass: our backends beside eager and compiled torch."""

import torch

from mpkernels.commands import contestants


def test_workload(benchmark, spec, workload, which, name, device):
    benchmark.group = f"{spec.name}: {workload.name}: {which}"
    arguments = workload.arguments(torch.float32, device)
    if name == contestants.EAGER:
        function = spec.eager
    elif name == contestants.COMPILED:
        function = contestants.compiled(spec)
    else:
        function = contestants.ours(spec, name)
    run = contestants.one_pass(spec, function, arguments, which)
    run()  # compiles, and fills the allocator
    cost = contestants.cost(spec, arguments, which)
    benchmark.extra_info.update(bytes=cost.bytes, flops=cost.flops, samples=workload.samples, torch=torch.__version__)
    if device == "cuda":

        def synchronised():
            run()
            torch.cuda.synchronize()

        benchmark(synchronised)
    else:
        benchmark(run)
