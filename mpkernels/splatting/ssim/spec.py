"""Cases, workloads and cost of SSIM."""

from __future__ import annotations

import torch

from mpkernels.spec import BadInput, Case, Cost, OpSpec, TritonKernel, Workload
from mpkernels.splatting.ssim import api, eager, schema

_BOTH = (torch.float32, torch.float64)


def _images(*shape: int, scale: float = 1.0, noise: float = 0.3, **settings):
    """Smooth images with texture in [0, scale], and the same with noise."""

    def make(dtype, device, generator):
        image = torch.rand(*shape, generator=generator, dtype=torch.float64)
        if image.numel():  # so that windows differ
            image = image * torch.linspace(0.2, 1, shape[-1]) * torch.linspace(1, 0.5, shape[-2])[:, None]
        other = torch.rand(*shape, generator=generator, dtype=torch.float64)
        target = (1 - noise) * image + noise * other
        return {"image": (image * scale).to(device, dtype), "target": (target * scale).to(device, dtype)} | settings

    return make


def _changed(make, change):
    """A case made from another: ``change(arguments)`` edits the arguments in place."""

    def changed(dtype, device, generator):
        arguments = make(dtype, device, generator)
        change(arguments)
        return arguments

    return changed


def _set(**replaced):
    return lambda arguments: arguments.update(
        {name: f(arguments[name]) if callable(f) else f for name, f in replaced.items()}
    )


def _channels_last(arguments) -> None:
    for name in ("image", "target"):
        arguments[name] = arguments[name].movedim(-3, -1).contiguous().movedim(-1, -3)


def _only_image_channels_last(arguments) -> None:
    arguments["image"] = arguments["image"].movedim(-3, -1).contiguous().movedim(-1, -3)


def _strided(arguments) -> None:
    """Every second pixel of a larger image, and a transposed target."""
    arguments["image"] = arguments["image"].repeat_interleave(2, -1).repeat_interleave(2, -2)[..., ::2, ::2]
    arguments["target"] = arguments["target"].mT.contiguous().mT


def _expanded(arguments) -> None:
    """One channel for all, by stride 0."""
    for name in ("image", "target"):
        arguments[name] = arguments[name][:, :1].expand_as(arguments[name])


def _flat(arguments) -> None:
    """Images of one value each, where a variance is all rounding."""
    arguments["image"] = torch.full_like(arguments["image"], 0.3)
    arguments["target"] = torch.full_like(arguments["target"], 0.2)


def _cost(arguments, backward: bool) -> Cost:
    image = arguments["image"]
    taps, pixels = arguments.get("window_size", 11), image.numel()
    size = image.element_size()
    if backward:  # the forward's moments again, and four maps blurred back
        return Cost(pixels * (4 * (2 * 2 * taps + 2 * 2 * taps) + 60), 4 * pixels * size)
    out = 0 if arguments.get("reduction", "mean") == "mean" else pixels
    return Cost(pixels * (4 * 2 * 2 * taps + 20), (2 * pixels + out) * size)


def _triton_kernels() -> tuple[TritonKernel, ...]:
    from mpkernels.splatting.ssim import triton  # imports Triton, which a CPU can do without

    return triton.compiled_kernels()


SPECS = (
    OpSpec(
        name="ssim",
        family="splatting",
        op=schema.FORWARD,
        function=lambda **arguments: (api.ssim(**arguments),),
        formula="(2 mu_x mu_y + C1)(2 sigma_xy + C2) / ((mu_x^2 + mu_y^2 + C1)(sigma_x^2 + sigma_y^2 + C2))",
        differentiable=("image", "target"),
        outputs=("ssim",),
        cases=(
            Case("mean of a small image", _images(1, 2, 3, 4), second_order=True),
            Case("map of a small image", _images(1, 1, 3, 5, reduction="none"), second_order=True),
            Case("valid", _images(1, 2, 4, 5, window_size=3, padding="valid", reduction="none"), second_order=True),
            Case("valid mean of one window", _images(2, 1, 11, 11, padding="valid")),
            Case("typical", _images(1, 2, 19, 140)),
            Case("typical map", _images(2, 1, 18, 30, reduction="none")),
            Case("an image without a batch", _images(2, 7, 12, reduction="none")),
            Case("odd sizes", _images(3, 1, 1, 123)),
            Case("one column", _images(1, 1, 35, 1, reduction="none")),
            Case("one pixel", _images(1, 1, 1, 1)),
            Case("a window of one pixel", _images(1, 2, 6, 9, window_size=1, reduction="none")),
            Case("a wide window", _images(1, 1, 9, 33, window_size=27, sigma=5.0, reduction="none")),
            Case("values up to 255", _images(1, 1, 14, 20, scale=255.0, data_range=255, padding="valid")),
            Case("no images", _images(0, 3, 16, 16)),
            Case("no rows", _images(2, 3, 0, 16)),
            Case("no columns", _images(2, 3, 5, 0, reduction="none")),
            Case("channels last", _changed(_images(1, 3, 17, 20), _channels_last)),
            Case("channels last, map", _changed(_images(1, 4, 9, 21, reduction="none"), _channels_last)),
            Case("channels last, valid", _changed(_images(1, 3, 13, 40, padding="valid"), _channels_last)),
            Case(
                "channels last, small",
                _changed(_images(1, 2, 2, 3, window_size=3, reduction="none"), _channels_last),
                second_order=True,
            ),
            Case("only the image has channels last", _changed(_images(1, 2, 4, 6), _only_image_channels_last)),
            Case("strided", _changed(_images(1, 2, 5, 9, reduction="none"), _strided)),
            Case("expanded", _changed(_images(1, 2, 6, 9), _expanded)),
            Case("flat", _changed(_images(1, 1, 9, 20, reduction="none"), _flat)),
            Case("several tiles", _images(1, 2, 80, 540), large=True),
        ),
        bad_inputs=(
            BadInput(
                "image no tensor", _changed(_images(1, 1, 9, 9), _set(image=lambda x: x.tolist())), TypeError, "image"
            ),
            BadInput(
                "bfloat16",
                _changed(_images(1, 1, 9, 9), _set(image=lambda x: x.bfloat16())),
                TypeError,
                "image.*float32 or float64.*bfloat16",
            ),
            BadInput("a plane", _changed(_images(9, 9), lambda _: None), ValueError, r"image.*\(C, H, W\).*\(9, 9\)"),
            BadInput(
                "target of another shape",
                _changed(_images(1, 1, 9, 9), _set(target=lambda x: x[0])),
                ValueError,
                r"target.*\(1, 1, 9, 9\).*\(1, 9, 9\)",
            ),
            BadInput(
                "target of another dtype",
                _changed(_images(1, 1, 9, 9), _set(target=lambda x: x.double())),
                TypeError,
                "target.*float32.*float64",
            ),
            BadInput(
                "target of another device",
                _changed(_images(1, 1, 9, 9), _set(target=lambda x: x.to("meta"))),
                ValueError,
                "target.*device.*meta",
            ),
            BadInput("even window", _images(1, 1, 9, 9, window_size=4), ValueError, "window_size.*odd.*4"),
            BadInput("no window", _images(1, 1, 9, 9, window_size=-1), ValueError, "window_size.*odd.*-1"),
            BadInput("window no integer", _images(1, 1, 9, 9, window_size=3.0), TypeError, "window_size.*float"),
            BadInput("sigma 0", _images(1, 1, 9, 9, sigma=0.0), ValueError, "sigma.*positive.*0"),
            BadInput("sigma NaN", _images(1, 1, 9, 9, sigma=float("nan")), ValueError, "sigma.*positive.*nan"),
            BadInput("sigma a string", _images(1, 1, 9, 9, sigma="1"), TypeError, "sigma.*str"),
            BadInput("negative range", _images(1, 1, 9, 9, data_range=-1), ValueError, "data_range.*positive.*-1"),
            BadInput("unknown padding", _images(1, 1, 9, 9, padding="zeros"), ValueError, "padding.*'same'.*'zeros'"),
            BadInput("unknown reduction", _images(1, 1, 9, 9, reduction="sum"), ValueError, "reduction.*'sum'"),
            BadInput(
                "smaller than the window", _images(1, 1, 20, 10, padding="valid"), ValueError, "image.*11.*20 x 10"
            ),
            BadInput("unknown backend", _images(1, 1, 9, 9, backend="cudnn"), ValueError, "backend.*'cudnn'"),
        ),
        workloads=(
            Workload("1920 x 1080, RGB", _images(1, 3, 1080, 1920), 3 * 1080 * 1920),
            Workload("648 x 420, RGB, rendered", _changed(_images(1, 3, 420, 648), _channels_last), 3 * 420 * 648),
        ),
        eager=lambda **arguments: (eager.ssim(**arguments),),
        cost=_cost,
        triton_kernels=_triton_kernels,
        second_order=False,
        dtypes=dict.fromkeys(("reference", "cpu", "fibres", "cuda", "triton"), _BOTH),
    ),
)
