"""Judge `mini` by drawings that it never saw:

    evaluate.py sheet        24 prompts at 256 px as one picture: look at it first
    evaluate.py posters      canvases of --size, with seams, discs and likeness to the guide; which have a second disc
    evaluate.py attributes   a classifier, trained here in --steps of 24 drawings, reads palette, time of day, terrain,
                             disc (kind, side, count), style and objects from drawings and from generated pictures
    evaluate.py distance     Fréchet distance of the classifier's features: generated against drawn, drawn
                             against drawn
    evaluate.py discs        roundness of big suns at 256 px, and a sheet of 48
    evaluate.py autoencoder  PSNR of 128-px pieces, whole scenes and crops; of halved latents too
    evaluate.py refine       a drawn 256-px scene, refined at --strength, against the scene drawn as large: seams and
                             power spectrum by octave; both pictures side by side, as large as they are

All judge the folder --model, by default the embedded one. `tiler.toml` in tiler/models/mini gives guidance.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from places import CACHE, SHIPPED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what", choices=["sheet", "posters", "attributes", "distance", "discs", "autoencoder", "refine"]
    )
    parser.add_argument("--model", type=Path, default=SHIPPED)
    parser.add_argument("--work", type=Path, default=CACHE, help="the classifier is kept here (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1500, help="training of the classifier")
    parser.add_argument("--count", type=int, default=0, help="default: 200; distance 2000; posters and refine 4")
    parser.add_argument("--size", default="2048", help="px, for posters and refine; posters also 3072x1024")
    parser.add_argument("--strength", type=float, default=0.5, help="for refine")
    parser.add_argument("--seed", type=int, default=0, help="the first seed, for sheet and posters")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's")
    parser.add_argument(
        "--out", type=Path, default=Path("sheet.png"), help="for sheet, posters, discs and refine: .png or .jpg"
    )
    args = parser.parse_args()
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as in train.py
    run(args)


def run(args: argparse.Namespace) -> None:
    import machine
    from judges import JUDGES, Settings
    from workshop import Workshop

    machine.prepare(args.threads)
    width, _, height = args.size.partition("x")
    settings = Settings(
        model=args.model,
        workshop=Workshop(work=args.work),
        steps=args.steps,
        count=args.count,
        width=int(width),
        height=int(height or width),
        strength=args.strength,
        seed=args.seed,
        out=args.out,
    )
    JUDGES[args.what](settings)


if __name__ == "__main__":
    main()
