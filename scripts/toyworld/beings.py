"""The living half of the kinds (and those with a face of their own): each function returns the parts of one thing."""

from __future__ import annotations

from scripts.toyworld.parts import (
    BLUSH,
    BODY,
    CARROT,
    CREAM,
    DARK,
    LAMPLIGHT,
    LEAF,
    METAL,
    PALE,
    PUPIL,
    WOOD,
    Part,
    Pose,
    ball,
    box,
    cone,
    eye,
    eyes,
    limb,
    ring,
    smile,
    turned,
)


def robot(pose: Pose) -> list[Part]:
    """Two rounded boxes on metal legs, with an antenna, a chest panel and big eyes."""
    hand_y = 0.30 + 0.14 * pose.lift
    wide = 0.24 + 0.02 * pose.girth
    lean = turned(z=5 * pose.tilt)
    parts = [
        box((0, 0.36, 0), (wide, 0.19, 0.18), BODY, edge=0.07),
        box((0, 0.74, 0), (0.29, 0.19, 0.2), BODY, edge=0.09, frame=lean),
        cone((0, 0.55, 0), 0.05, 0.09, 0.09, METAL),
        limb((0, 0.9, 0), (0.02 * pose.tilt, 1.03, 0), 0.016, 0.016, METAL),
        ball((0.02 * pose.tilt, 1.06, 0), 0.05, LAMPLIGHT),
        box((0, 0.36, 0.165), (0.14, 0.1, 0.03), PALE, edge=0.02),
        box((0, 0.64, 0.195), (0.08, 0.018, 0.02), DARK, edge=0.015),
    ]
    parts += [ball((x, 0.34, 0.2), 0.025, m) for x, m in ((-0.07, DARK), (0.0, METAL), (0.07, DARK))]
    for side in (-1, 1):
        parts += [
            limb((side * 0.12, 0.17, 0), (side * 0.12, 0.06, 0), 0.05, 0.05, METAL),
            box((side * 0.13, 0.05, 0.04), (0.1, 0.05, 0.14), BODY, edge=0.045),
            cone((side * 0.3, 0.74, 0), 0.03, 0.07, 0.07, METAL, frame=turned(z=90)),
            limb((side * wide, 0.46, 0), (side * 0.38, hand_y if side > 0 else 0.26, 0.04), 0.042, 0.042, METAL),
            ball((side * 0.4, (hand_y if side > 0 else 0.26) - 0.02, 0.05), 0.075, BODY),
        ]
    return parts + eyes(0.77, 0.17, 0.125, 0.105, pose.look)


def cat(pose: Pose) -> list[Part]:
    """Sits and looks at you: round head, pointed ears, curled tail."""
    plump = 1 + 0.08 * pose.girth
    head = turned(z=6 * pose.tilt)
    tip = 0.46 + 0.12 * pose.lift
    parts = [
        ball((0, 0.26, -0.02), (0.22 * plump, 0.27, 0.2), BODY, soft=True),
        ball((0, 0.64, 0.03), (0.3, 0.24, 0.23), BODY, frame=head, soft=True),
        limb((0.15, 0.09, -0.12), (0.36, 0.14, -0.1), 0.06, 0.055, BODY, soft=True),
        limb((0.36, 0.14, -0.1), (0.43, tip, -0.06), 0.055, 0.05, BODY, soft=True),
        ball((0.43, tip, -0.06), 0.056, CREAM),
        ball((0, 0.25, 0.1), (0.13, 0.18, 0.1), CREAM),
        ball((0, 0.555, 0.21), (0.1, 0.065, 0.07), CREAM),
        ball((0, 0.595, 0.275), (0.035, 0.025, 0.02), BLUSH),
    ]
    for side in (-1, 1):
        parts += [
            cone((side * 0.19, 0.85, 0.02), 0.12, 0.12, 0.012, BODY, frame=turned(z=-18 * side), soft=True),
            cone((side * 0.19, 0.835, 0.07), 0.08, 0.07, 0.008, BLUSH, frame=turned(z=-18 * side)),
            ball((side * 0.1, 0.05, 0.16), (0.085, 0.055, 0.11), BODY, soft=True),
            limb((side * 0.19, 0.565, 0.19), (side * 0.37, 0.6, 0.17), 0.009, 0.006, DARK),
            limb((side * 0.19, 0.54, 0.19), (side * 0.36, 0.52, 0.17), 0.009, 0.006, DARK),
        ]
    return parts + eyes(0.69, 0.19, 0.125, 0.095, pose.look)


def fish(pose: Pose) -> list[Part]:
    """Swims to the right just above the ground; fins and a forked tail."""
    sweep = 14 * pose.lift
    body_half = 0.27 + 0.025 * pose.girth
    parts = [
        ball((0.06, 0.4, 0), (0.42, body_half, 0.2), BODY, soft=True),
        ball((-0.47, 0.5, 0), (0.19, 0.085, 0.05), BODY, frame=turned(z=-48 - sweep), soft=True),
        ball((-0.47, 0.3, 0), (0.19, 0.085, 0.05), BODY, frame=turned(z=48 - sweep), soft=True),
        ball((0.0, 0.66, 0), (0.2, 0.11, 0.04), BODY, frame=turned(z=12), soft=True),
        ball((-0.02, 0.14, 0), (0.13, 0.07, 0.04), BODY, frame=turned(z=-20), soft=True),
        ball((0.2, 0.31, 0.07), (0.2, 0.14, 0.13), CREAM),
        ball((-0.04, 0.35, 0.2), (0.12, 0.06, 0.03), BODY, frame=turned(y=-25, z=20 + sweep)),
        limb((0.34, 0.33, 0.155), (0.43, 0.36, 0.1), 0.013, 0.011, PUPIL),
        limb((0.28, 0.36, 0.17), (0.34, 0.33, 0.155), 0.011, 0.013, PUPIL),
    ]
    return parts + eye((0.25, 0.47, 0.13), 0.105, pose.look) + eye((0.25, 0.47, -0.13), 0.105, pose.look)


def bird(pose: Pose) -> list[Part]:
    """A round songbird on thin legs, with wings, a crest and a tail."""
    wing = 24 + 22 * pose.lift
    plump = 1 + 0.05 * pose.girth
    parts = [
        ball((0, 0.44, 0), (0.31 * plump, 0.3, 0.29), BODY, soft=True),
        ball((0, 0.7, 0.03), (0.25, 0.22, 0.22), BODY, soft=True),
        ball((0, 0.4, 0.13), (0.19, 0.2, 0.18), CREAM),
        cone((0, 0.64, 0.3), 0.07, 0.07, 0.006, CARROT, frame=turned(x=80), edge=0.006),
        ball((0.0, 0.35, -0.36), (0.1, 0.04, 0.2), BODY, frame=turned(x=28)),
        limb((0.0, 0.9, 0), (-0.05, 0.99, -0.02), 0.035, 0.012, BODY, soft=True),
        limb((0.01, 0.9, 0), (0.04, 1.02, -0.02), 0.035, 0.012, BODY, soft=True),
    ]
    for side in (-1, 1):
        parts += [
            ball((side * 0.33, 0.45, -0.01), (0.08, 0.21, 0.14), BODY, frame=turned(z=side * wing)),
            limb((side * 0.1, 0.18, 0), (side * 0.11, 0.03, 0.02), 0.022, 0.022, CARROT),
            ball((side * 0.11, 0.02, 0.06), (0.055, 0.022, 0.08), CARROT),
        ]
    return parts + eyes(0.74, 0.19, 0.105, 0.088, pose.look)


def mushroom(pose: Pose) -> list[Part]:
    """A spotted cap on a plump stalk that carries the face."""
    lean = turned(z=7 * pose.tilt)
    wide = 0.46 + 0.03 * pose.girth
    parts = [
        cone((0, 0.22, 0), 0.24, 0.21, 0.15, CREAM, edge=0.09),
        ball((0, 0.44, 0), (wide, 0.48, wide), BODY, frame=lean, cut=(0.0, 9.0)),
        ball((0, 0.45, 0), (wide * 0.96, 0.08, wide * 0.96), CREAM, frame=lean),
        ball((-0.03, 0.75, 0.3), (0.09, 0.08, 0.07), PALE, frame=turned(x=-35)),
        ball((0.25, 0.66, 0.26), (0.075, 0.07, 0.06), PALE),
        ball((-0.29, 0.64, 0.23), (0.075, 0.07, 0.06), PALE),
        ball((0.1, 0.89, 0.08), (0.07, 0.05, 0.06), PALE),
        ball((-0.17, 0.86, 0.08), (0.055, 0.045, 0.055), PALE),
        ball((0.1, 0.57, 0.41), (0.05, 0.045, 0.04), PALE),
    ]
    return parts + eyes(0.29, 0.155, 0.085, 0.075, pose.look) + smile((0, 0.15, 0.2), 0.045)


def flower(pose: Pose) -> list[Part]:
    """Eight petals round a cream face, on a stem with two leaves."""
    sway = 0.05 * pose.tilt
    parts = [
        limb((0, 0.0, -0.03), (sway, 0.6, -0.06), 0.034, 0.03, LEAF),
        ball((0.14, 0.16, 0), (0.16, 0.055, 0.07), LEAF, frame=turned(z=32 + 10 * pose.lift)),
        ball((-0.14, 0.22, 0), (0.15, 0.05, 0.07), LEAF, frame=turned(z=-34 - 10 * pose.lift)),
        ball((sway, 0.68, 0.02), (0.165, 0.165, 0.09), CREAM),
    ]
    spin = 11 * pose.look
    for k in range(8):
        # A petal points along its own x axis, away from the face.
        frame = turned(z=45.0 * k + spin)
        x, y, _ = frame[0]
        parts.append(ball((sway + 0.225 * x, 0.68 + 0.225 * y, -0.01), (0.14, 0.1, 0.05), BODY, frame=frame))
    face = eyes(0.71, 0.085, 0.065, 0.055, pose.look) + smile((0, 0.615, 0.115), 0.04)
    return parts + [_moved(part, sway) for part in face]


def snowman(pose: Pose) -> list[Part]:
    """Three balls, stick arms, a scarf and a hat; it is dyed in the thing's colour."""
    raised = 0.56 + 0.16 * pose.lift
    parts = [
        ball((0, 0.23, 0), (0.3, 0.25, 0.29), BODY, soft=True),
        ball((0, 0.52, 0), (0.22, 0.19, 0.21), BODY, soft=True),
        ball((0, 0.77, 0.01), (0.19, 0.175, 0.18), BODY),
        ring((0, 0.635, 0.01), 0.15, 0.045, PALE),
        limb((0.11, 0.62, 0.13), (0.13, 0.46, 0.2), 0.045, 0.05, PALE),
        cone((0, 0.915, 0), 0.018, 0.2, 0.2, DARK, frame=turned(z=6 * pose.tilt)),
        cone((0, 1.01, 0), 0.1, 0.135, 0.12, DARK, frame=turned(z=6 * pose.tilt)),
        cone((0, 0.745, 0.24), 0.085, 0.034, 0.006, CARROT, frame=turned(x=86), edge=0.005),
        ball((0, 0.52, 0.2), 0.027, DARK),
        ball((0, 0.4, 0.225), 0.027, DARK),
    ]
    for side in (-1, 1):
        hand_y = raised if side > 0 else 0.62
        parts += [
            limb((side * 0.18, 0.54, 0), (side * 0.42, hand_y, 0.02), 0.022, 0.016, WOOD),
            limb(
                (side * 0.34, 0.54 + 0.66 * (hand_y - 0.54), 0.01),
                (side * 0.38, hand_y + 0.08, 0.02),
                0.014,
                0.01,
                WOOD,
            ),
        ]
    return parts + eyes(0.81, 0.14, 0.075, 0.062, pose.look)


def _moved(part: Part, dx: float) -> Part:
    x, y, z = part.at
    return Part(part.shape, (x + dx, y, z), part.dims, part.material, part.frame, part.soft, part.cut)
