"""The made half of the kinds: each function returns the parts of one thing."""

from __future__ import annotations

from scripts.toyworld.parts import (
    BODY,
    CREAM,
    DARK,
    GLASS,
    LAMPLIGHT,
    METAL,
    PALE,
    SHADE,
    SLATE,
    WOOD,
    Part,
    Pose,
    ball,
    box,
    cone,
    eyes,
    limb,
    ring,
    smile,
    turned,
)


def house(pose: Pose) -> list[Part]:
    """A cottage: two roof slabs, chimney, door, and two lit windows."""
    wide = 0.36 + 0.03 * pose.girth
    peak = 0.5
    parts = [
        box((0, 0.27, 0), (wide, 0.28, 0.28), BODY, edge=0.03),
        # The gable: a square box on its corner, of which the upper half shows under the roof.
        box((0, peak, 0), (wide * 0.7, wide * 0.7, 0.277), BODY, edge=0.02, frame=turned(z=45)),
        box((0.2, 0.86, -0.06), (0.06, 0.14, 0.06), SLATE, edge=0.012),
        box((0.2, 0.99, -0.06), (0.075, 0.025, 0.075), PALE, edge=0.01),
        box((0, 0.17, 0.275), (0.09, 0.17, 0.025), WOOD, edge=0.02),
        ball((0.05, 0.17, 0.305), 0.018, LAMPLIGHT),
        cone((0, 0.66, 0.275), 0.02, 0.075, 0.075, LAMPLIGHT, frame=turned(x=90)),
        ring((0, 0.66, 0.285), 0.08, 0.016, PALE, frame=turned(x=90)),
        box((0, 0.015, 0.32), (0.14, 0.02, 0.07), PALE, edge=0.012),
    ]
    for side in (-1, 1):
        parts += [
            box((side * 0.245, 0.715, 0), (0.37, 0.038, 0.34), SLATE, edge=0.03, frame=turned(z=-45 * side)),
            box((side * 0.225, 0.31, 0.275), (0.09, 0.1, 0.018), PALE, edge=0.012),
            box((side * 0.225, 0.31, 0.287), (0.068, 0.078, 0.018), LAMPLIGHT, edge=0.01),
            box((side * 0.225, 0.31, 0.3), (0.009, 0.078, 0.012), PALE, edge=0.004),
            box((side * 0.225, 0.31, 0.3), (0.068, 0.009, 0.012), PALE, edge=0.004),
        ]
    return parts


def tree(pose: Pose) -> list[Part]:
    """A cloud of leaves on a short trunk, with a face in the leaves."""
    sway = 0.03 * pose.tilt
    parts = [
        cone((0, 0.17, 0), 0.19, 0.12, 0.075, WOOD, edge=0.02),
        limb((0.02, 0.25, 0), (0.19, 0.42, 0), 0.045, 0.035, WOOD),
        limb((0.0, 0.04, 0), (0.17, 0.01, 0.06), 0.05, 0.02, WOOD),
        limb((0.0, 0.04, 0), (-0.16, 0.01, 0.07), 0.05, 0.02, WOOD),
    ]
    leaves = (
        (0.0, 0.64, 0.02, 0.29),
        (-0.25, 0.56, 0.0, 0.19),
        (0.26, 0.57, 0.0, 0.19),
        (-0.15, 0.81, -0.02, 0.19),
        (0.16, 0.82, -0.02, 0.19),
        (0.0, 0.93, -0.02, 0.15),
        (0.1, 0.52, 0.14, 0.16),
        (-0.12, 0.5, 0.13, 0.16),
    )
    parts += [ball((x + sway, y, z), r * (1 + 0.05 * pose.girth), BODY, soft=True) for x, y, z, r in leaves]
    return parts + eyes(0.7, 0.285, 0.1, 0.085, pose.look) + smile((0, 0.565, 0.325), 0.05)


def car(pose: Pose) -> list[Part]:
    """Drives to the right; its eyes look out of the side windows."""
    roof = 0.5 + 0.02 * pose.girth
    parts = [
        box((0, 0.27, 0), (0.56, 0.14, 0.27), BODY, edge=0.1, soft=True),
        box((-0.06, 0.45, 0), (0.32, roof - 0.32, 0.23), BODY, edge=0.11, soft=True),
        box((-0.06, 0.475, 0), (0.265, 0.095, 0.238), GLASS, edge=0.035),
        box((-0.06, 0.475, 0), (0.333, 0.09, 0.17), GLASS, edge=0.03),
        box((-0.06, 0.47, 0), (0.016, 0.11, 0.243), BODY, edge=0.01),
        box((0, 0.185, 0), (0.57, 0.03, 0.255), METAL, edge=0.025),
        ball((0.53, 0.29, 0.16), (0.05, 0.06, 0.06), LAMPLIGHT),
        ball((0.53, 0.29, -0.16), (0.05, 0.06, 0.06), LAMPLIGHT),
        box((-0.54, 0.31, 0.17), (0.03, 0.04, 0.05), DARK, edge=0.02),
        box((0.02, 0.345, 0.265), (0.045, 0.014, 0.015), METAL, edge=0.01),
    ]
    for x in (-0.31, 0.31):
        for z in (-0.22, 0.22):
            hub = 0.06 if z > 0 else -0.06
            parts += [
                cone((x, 0.14, z), 0.065, 0.14, 0.14, DARK, frame=turned(x=90), edge=0.04),
                cone((x, 0.14, z + hub), 0.02, 0.068, 0.068, PALE, frame=turned(x=90)),
            ]
    return parts + [_shifted(part, -0.06) for part in eyes(0.47, 0.2, 0.13, 0.082, pose.look)]


def rocket(pose: Pose) -> list[Part]:
    """Stands on its fins; eyes behind the porthole."""
    plump = 1 + 0.06 * pose.girth
    parts = [
        ball((0, 0.53, 0), (0.235 * plump, 0.5, 0.235 * plump), BODY, cut=(-0.33, 0.28)),
        ball((0, 0.53, 0), (0.236 * plump, 0.5, 0.236 * plump), PALE, cut=(0.29, 9.0)),
        ball((0, 0.53, 0), (0.245 * plump, 0.5, 0.245 * plump), METAL, cut=(0.265, 0.305)),
        cone((0, 0.16, 0), 0.06, 0.12, 0.15, METAL),
        cone((0, 0.58, 0.215), 0.04, 0.145, 0.145, METAL, frame=turned(x=90)),
        cone((0, 0.58, 0.23), 0.045, 0.118, 0.118, GLASS, frame=turned(x=90)),
        box((0, 0.21, 0.12), (0.028, 0.19, 0.09), SHADE, edge=0.02),
        limb((0, 1.0, 0), (0, 1.08, 0), 0.02, 0.008, METAL),
    ]
    for side in (-1, 1):
        parts += [
            box((side * 0.24, 0.23, 0), (0.12, 0.07, 0.03), SHADE, edge=0.025, frame=turned(z=side * -52)),
            box((side * 0.3, 0.1, 0), (0.06, 0.1, 0.03), SHADE, edge=0.025),
        ]
    return parts + eyes(0.585, 0.265, 0.054, 0.054, pose.look)


def cup(pose: Pose) -> list[Part]:
    """A mug with a handle and a face, full of cocoa."""
    lean = 0.02 * pose.girth
    parts = [
        cone((0, 0.4, 0), 0.4, 0.31 - lean, 0.37 + lean, BODY, edge=0.07),
        ring((0, 0.78, 0), 0.335 + lean, 0.04, BODY),
        cone((0, 0.785, 0), 0.02, 0.31 + lean, 0.31 + lean, WOOD),
        ring((0.4, 0.42, 0), 0.17, 0.05, BODY, frame=turned(x=90)),
        ball((0.1, 0.8, 0.08), (0.09, 0.03, 0.07), CREAM),
        ball((-0.09, 0.8, 0.02), (0.08, 0.03, 0.07), CREAM),
    ]
    return parts + eyes(0.46, 0.325, 0.125, 0.1, pose.look) + smile((0, 0.25, 0.355), 0.06, 0.017)


def lamp(pose: Pose) -> list[Part]:
    """A table lamp: wide shade, thin stem, and a round base that carries the face."""
    lean = turned(z=7 * pose.tilt)
    parts = [
        cone((0, 0.76, 0), 0.23, 0.4, 0.22, BODY, frame=lean, edge=0.02),
        cone((0, 0.53, 0), 0.014, 0.385, 0.385, LAMPLIGHT, frame=lean, edge=0.008),
        ring((0, 0.535, 0), 0.395, 0.018, PALE, frame=lean),
        ball((-0.03 * pose.tilt, 1.0, 0), 0.035, METAL),
        limb((0, 0.3, 0), (0, 0.55, 0), 0.03, 0.03, METAL),
        ball((0, 0.21, 0), (0.24 + 0.02 * pose.girth, 0.19, 0.22), BODY),
        cone((0, 0.03, 0), 0.03, 0.2, 0.18, METAL),
        limb((0.2, 0.5, 0.12), (0.2, 0.36, 0.12), 0.008, 0.008, METAL),
        ball((0.2, 0.35, 0.12), 0.024, METAL),
    ]
    return parts + eyes(0.24, 0.175, 0.085, 0.075, pose.look) + smile((0, 0.13, 0.21), 0.04)


def boat(pose: Pose) -> list[Part]:
    """A little sailing boat with a coloured hull and sail, and a face on the hull."""
    puff = 0.05 + 0.02 * pose.girth
    parts = [
        ball((0, 0.36, 0), (0.56, 0.36, 0.27), BODY, cut=(-9.0, 0.0)),
        ball((0, 0.375, 0), (0.575, 0.04, 0.285), PALE),
        box((-0.26, 0.43, 0), (0.13, 0.07, 0.12), CREAM, edge=0.03),
        limb((-0.02, 0.36, 0), (-0.02, 1.08, 0), 0.022, 0.016, WOOD),
        limb((-0.06, 0.49, 0.0), (0.42, 0.49, 0.0), 0.016, 0.016, WOOD),
        ball((-0.02, 1.1, 0), 0.028, LAMPLIGHT),
    ]
    # The sail, a stack of melting slats: a triangle that swells towards the camera.
    for k in range(8):
        y = 0.55 + 0.062 * k
        reach = 0.40 * (1 - k / 8.4)
        parts.append(limb((0.035, y, 0.01), (0.035 + reach, y, puff), 0.05, 0.042, BODY, soft=True))
    return parts + eyes(0.24, 0.235, 0.12, 0.085, pose.look) + smile((0, 0.125, 0.225), 0.045)


def _shifted(part: Part, dx: float) -> Part:
    x, y, z = part.at
    return Part(part.shape, (x + dx, y, z), part.dims, part.material, part.frame, part.soft, part.cut)
