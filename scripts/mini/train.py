"""Train `mini`, each stage from where it stopped, else from the committed weights:

    train.py draw --shards 22      drawings to learn from, 1,000 a shard
    train.py vae --minutes 15      the autoencoder; with --decoder that alone
    train.py words                 a new vocabulary, where captions have new words; then `unet --fresh`
    train.py unet --minutes 60     the UNet with its text encoder
    train.py export --out FOLDER   averaged weights as a diffusers folder (default: tiler/models/mini)

README.md beside this file has the recipe.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from places import CACHE, SHIPPED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["draw", "vae", "words", "unet", "export"])
    parser.add_argument("--work", type=Path, default=CACHE, help="pool and states (default: %(default)s)")
    parser.add_argument(
        "--fresh", action="store_true", help="leave this stage's state and go on from committed weights"
    )
    parser.add_argument("--cold", action="store_true", help="with --fresh: begin without weights")
    parser.add_argument("--shards", type=int, default=22, help="draw: how many")
    parser.add_argument("--processes", type=int, default=1, help="draw: how many at once")
    parser.add_argument("--part", type=int, default=500, help="scenes and crops in a shard")
    parser.add_argument("--minutes", type=float, default=10, help="0: one step")
    parser.add_argument("--batch", type=int, default=0, help="default: 16 (vae), 32 (unet); on CUDA 128, 256")
    parser.add_argument("--decoder", action="store_true", help="vae: the decoder alone; latents stay as they are")
    parser.add_argument("--smooth", type=float, default=0.0, help="vae: weight of decoding shrunk latents")
    parser.add_argument("--lr", type=float, default=0.0, help="default: 3e-4 (vae), 1e-3 (unet)")
    parser.add_argument("--crops", type=float, default=0.35, help="unet: share of crops")
    parser.add_argument("--focus", type=float, default=3.0, help="unet: weight of sun, moon and boat without noise")
    parser.add_argument("--falling", type=float, default=1 / 3, help="unet: share of the run in which its steps shrink")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's")
    parser.add_argument("--out", type=Path, default=SHIPPED)
    args = parser.parse_args()
    if args.processes < 1 or not 0 < args.falling <= 1:
        parser.error("--processes is 1 or more, --falling above 0 and at most 1")
    if args.smooth < 0:
        parser.error("--smooth is 0 or more")
    # numpy reads it when it is loaded: products of drawing are too small for threads that wait for each other.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    run(args)


def run(args: argparse.Namespace) -> None:
    import machine
    import stages
    from train_unet import UnetSettings, train_unet
    from train_vae import VaeSettings, train_vae
    from workshop import Workshop

    machine.prepare(args.threads)
    workshop = Workshop(work=args.work, part=args.part)
    own = {"minutes": args.minutes, "batch": args.batch, "fresh": args.fresh, "cold": args.cold}
    if args.stage == "draw":
        stages.draw(workshop, args.shards, args.processes)
    elif args.stage == "vae":
        lr = args.lr or VaeSettings.lr
        train_vae(workshop, VaeSettings(lr=lr, decoder=args.decoder, smooth=args.smooth, **own))
    elif args.stage == "words":
        stages.learn_words(workshop)
    elif args.stage == "unet":
        lr = args.lr or UnetSettings.lr
        train_unet(workshop, UnetSettings(lr=lr, crops=args.crops, focus=args.focus, falling=args.falling, **own))
    else:
        stages.export(workshop, args.out)


if __name__ == "__main__":
    main()
