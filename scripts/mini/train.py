"""Train `mini`: `train.py vae`, then `train.py unet`, then `train.py export`. Every stage resumes where it stopped;
where no autoencoder was trained, `unet` goes on from the repository's weights.

Runs on CUDA when there is one, else on the CPU; there glibc's heap should keep what it is given, or every activation is
mapped anew (encoding the pool takes four times as long, a training step a tenth more):
MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_TOP_PAD_=268435456. Work files live in --work (default ~/.cache/tiler/mini); `export`
writes the diffusers folder.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import captions
import model
import numpy as np
import scenes
import torch
import torch.nn.functional as F
from data import HELD_OUT, ahead, busy_view, crops, random_view, to_tensor
from diffusers import AutoencoderKL, StableDiffusionPipeline
from heads import DEVICE, Layout, Words
from transformers import CLIPTokenizer

SAVE_EVERY = 600.0  # seconds
SHIPPED = Path(__file__).parents[2] / "tiler/models/mini"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["vae", "unet", "export"])
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/tiler/mini")
    parser.add_argument("--minutes", type=float, default=60, help="stop after this long; the next run goes on")
    parser.add_argument("--batch", type=int, default=0, help="default 16 (vae) or 24 (unet) on CPU, 128 or 256 on CUDA")
    parser.add_argument("--lr", type=float, default=0.0)
    parser.add_argument("--pool", type=int, default=8000, help="scenes, and as many crops, encoded once for the unet")
    parser.add_argument(
        "--side", type=int, default=model.NATIVE, help="px of the unet's pictures; start with 128: 4× as fast"
    )
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, default=SHIPPED)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    {"vae": train_vae, "unet": train_unet, "export": export}[args.stage](args)


# --- state -----------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds of work since the start: a step counts for at most ten seconds, so a suspended run keeps its schedule."""

    def __init__(self, minutes: float) -> None:
        self.spent, self.limit, self._last = 0.0, 60 * minutes, time.monotonic()

    def tick(self) -> None:
        now = time.monotonic()
        self.spent += min(10.0, now - self._last)
        self._last = now

    @property
    def left(self) -> float:
        """The share of the run still to come, 1 to 0."""
        return max(0.0, 1 - self.spent / self.limit)


class Ema:
    """Exponential moving average of parameters, warmed up: decay = min(limit, (1 + n) / (10 + n))."""

    def __init__(self, modules: list[torch.nn.Module], limit: float) -> None:
        self.live = [p for m in modules for p in m.parameters()]
        self.mean = [p.detach().clone() for p in self.live]
        self.limit = limit

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.limit, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.mean, self.live, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange live and averaged weights (call twice around an evaluation)."""
        for p, m in zip(self.live, self.mean, strict=True):
            kept = p.detach().clone()
            p.copy_(m)
            m.copy_(kept)


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """The nearest matrix of orthogonal rows or columns, roughly: Newton and Schulz's iteration with Jordan's coefficients."""
    if len(x) > len(x.T):
        return orthogonal(x.T).T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x


class Muon:
    """Momentum made orthogonal, for weights that are matrices (Jordan 2024, kellerjordan.github.io/posts/muon), with steps as
    large as AdamW's (Liu et al. 2025, arXiv:2502.16982, 2.2). torch.optim.Muon computes in bf16: 17 times slower here."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.parameters = parameters
        self.momentum = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float = 0.01, beta: float = 0.95) -> None:
        for p, m in zip(self.parameters, self.momentum, strict=True):
            assert p.grad is not None
            m.lerp_(p.grad, 1 - beta)
            matrix = p.grad.lerp(m, beta).flatten(1)
            update = orthogonal(matrix) * (0.2 * max(matrix.shape) ** 0.5)
            p.mul_(1 - lr * weight_decay).add_(update.view_as(p), alpha=-lr)


def save(path: Path, **parts: object) -> None:
    temp = path.with_suffix(".tmp")
    torch.save(parts, temp)
    temp.replace(path)


# --- stages ----------------------------------------------------------------------------------------------------------


def train_vae(args: argparse.Namespace) -> None:
    torch.manual_seed(1)
    vae = model.build_vae().to(DEVICE)
    batch = args.batch or (16 if DEVICE == "cpu" else 128)
    lr = args.lr or 5e-4
    opt = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=1e-4)
    ema, step, path = Ema([vae], 0.999), 0, args.work / "vae.pt"
    if path.exists():
        state = torch.load(path, map_location=DEVICE)
        vae.load_state_dict(state["vae"])
        opt.load_state_dict(state["opt"])
        ema.mean, step = [m.to(DEVICE) for m in state["ema"]], state["step"]
    else:
        model.start_as_pooling(vae, to_tensor(next(crops(1, 64, 128))).to(DEVICE))
        ema = Ema([vae], 0.999)
    held = to_tensor(np.concatenate([next(crops(HELD_OUT + k, 16, 128)) for k in range(2)])).to(DEVICE)
    clock, saved = Clock(args.minutes), 0.0
    losses: list[float] = []
    for images in ahead(crops(step + 7, batch, 128)):
        clock.tick()
        for group in opt.param_groups:  # warm up, then fall with the time that is left
            group["lr"] = lr * min(1.0, (step + 1) / 200) * max(0.05, min(1.0, 2 * clock.left))
        x = to_tensor(images).to(DEVICE)
        mean = vae.quant_conv(vae.encoder(x))[:, : model.LATENT_CHANNELS]
        y = vae.decode(mean + model.POSTERIOR_STD * torch.randn_like(mean)).sample
        d = y - x
        edges = (d[..., 1:] - d[..., :-1]).abs().mean() + (d[..., 1:, :] - d[..., :-1, :]).abs().mean()
        # Unit variance per channel is what the diffusion sees; a soft pull keeps it there.
        z_loss = (mean.std(dim=(0, 2, 3)) - 1).square().mean() + mean.mean(dim=(0, 2, 3)).square().mean()
        loss = d.abs().mean() + 0.5 * edges + d.square().mean() + 0.01 * z_loss
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 0.5)
        opt.step()
        # The log-variance half of quant_conv is a constant of the design.
        with torch.no_grad():
            vae.quant_conv.weight[model.LATENT_CHANNELS :] = 0
            vae.quant_conv.bias[model.LATENT_CHANNELS :] = 2 * np.log(model.POSTERIOR_STD)
        step += 1
        ema.update(step)
        losses.append(loss.item())
        done = not clock.left
        if step % 200 == 0 or done:
            ema.swap()
            with torch.no_grad():
                z = vae.encode(held).latent_dist.mean
                mse = (vae.decode(z).sample.clamp(-1, 1) - held).square().mean(dim=(1, 2, 3)) / 4
            ema.swap()
            psnr = -10 * mse.clamp_min(1e-7).log10()
            print(
                f"vae step {step} loss {np.mean(losses[-200:]):.4f} psnr scenes {psnr[1::2].mean():.2f} crops {psnr[0::2].mean():.2f}"
                f" z std {z.std(dim=(0, 2, 3)).min():.2f}–{z.std(dim=(0, 2, 3)).max():.2f} {clock.spent:.0f} s",
                flush=True,
            )
        if done or clock.spent - saved > SAVE_EVERY:
            save(path, vae=vae.state_dict(), opt=opt.state_dict(), ema=ema.mean, step=step)
            saved = clock.spent
        if done:
            return


def untrained(work: Path) -> bool:
    """Whether nothing was trained here: then the repository's own weights and vocabulary are gone on from."""
    return not (work / "vae.pt").exists()


def load_vae(work: Path) -> torch.nn.Module:
    """The averaged autoencoder, its latents scaled to unit variance by quant_conv and post_quant_conv; the repository's own
    where none was trained here."""
    if untrained(work):
        return AutoencoderKL.from_pretrained(SHIPPED / "vae").eval().to(DEVICE)
    vae = model.build_vae()
    state = torch.load(work / "vae.pt", map_location="cpu")
    with torch.no_grad():
        for p, m in zip(vae.parameters(), state["ema"], strict=True):
            p.copy_(m)
    return vae.eval().to(DEVICE)


def encode_pool(args: argparse.Namespace) -> dict[str, object]:
    """Latents (2·pool, C, 32, 32) fp16 of whole scenes, then crops, and six captions of each crop; made once, kept in work."""
    path = args.work / f"pool-{args.pool}-{args.side}.pt"
    if path.exists():
        return torch.load(path)
    vae = load_vae(args.work)
    rng = np.random.default_rng(3)
    latents, texts = [], []
    start = time.monotonic()
    for part in ("scenes", "crops"):
        for i in range(0, args.pool, 32):
            images = []
            for k in range(i, min(i + 32, args.pool)):
                scene = scenes.make(k)
                view = None if part == "scenes" else busy_view(rng, scene, (0.5, 0.25, 0.18, 0.125))
                images.append(scenes.render(scene, view, args.side, args.side))
                if view is None:
                    continue
                shown = [captions.caption(scene, rng, view, keep) for keep in (1.0, 0.8, 0.6, 0.4)]
                # A tile of a poster is refined under the poster's prompt: crops also carry the whole scene's words.
                shown += [captions.caption(scene, rng, None, keep) for keep in (0.9, 0.7)]
                texts.append(shown)
            with torch.no_grad():
                z = vae.encode(to_tensor(np.stack(images)).to(DEVICE)).latent_dist.mean
            latents.append(z.half().cpu())
        print(f"pool {part} {time.monotonic() - start:.0f} s", flush=True)
    pool = {"latents": torch.cat(latents), "captions": texts}
    torch.save(pool, path)
    return pool


def get_tokenizer(work: Path) -> CLIPTokenizer:
    folder = work / "tokenizer"
    if untrained(work):
        return CLIPTokenizer.from_pretrained(SHIPPED / "tokenizer")
    if not (folder / "vocab.json").exists():
        rng = np.random.default_rng(5)
        some = [
            captions.caption(scenes.make(k), rng, v, 0.8)
            for k in range(6000)
            for v in (None, random_view(rng, 1.0, (0.3,)))
        ]
        return model.train_tokenizer(some, folder)
    return CLIPTokenizer.from_pretrained(folder)


def train_unet(args: argparse.Namespace) -> None:
    torch.manual_seed(2)
    pool = encode_pool(args)
    latents = pool["latents"]
    half = len(latents) // 2
    known = [scenes.make(k) for k in range(half)]
    tokenizer = get_tokenizer(args.work)
    unet, text = model.build_unet().to(DEVICE), model.build_text_encoder(len(tokenizer)).to(DEVICE)
    if untrained(args.work):
        unet.load_state_dict(type(unet).from_pretrained(SHIPPED / "unet").state_dict())
        text.load_state_dict(type(text).from_pretrained(SHIPPED / "text_encoder").state_dict())
    batch = args.batch or (24 if DEVICE == "cpu" else 256)
    reader = Layout(unet, known, args.side // 16)
    named = [*unet.named_parameters(), *text.named_parameters()]
    words = Words(text, known)
    heads = [*reader.head.parameters(), *words.heads.parameters()]
    parameters = [p for _, p in named] + heads
    inner = {n: p for n, p in named if p.ndim > 1 and not any(k in n for k in ("embedding", "conv_in", "conv_out"))}
    muon = Muon(list(inner.values()))
    rest = [p for n, p in named if n not in inner] + heads
    opt = torch.optim.AdamW(rest, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    ema, step, path = Ema([unet, text], 0.998), 0, args.work / "unet.pt"
    if path.exists():
        state = torch.load(path, map_location=DEVICE)
        unet.load_state_dict(state["unet"])
        text.load_state_dict(state["text"])
        if "head" in state:  # else it comes from a run without
            reader.head.load_state_dict(state["head"])
        if "words" in state:  # likewise
            words.heads.load_state_dict(state["words"])
            opt.load_state_dict(state["opt"])
        if "momentum" in state:  # else it comes from a run with AdamW alone
            muon.momentum = [m.to(DEVICE) for m in state["momentum"]]
        ema.mean, step = [m.to(DEVICE) for m in state["ema"]], state["step"]
    alphas = model.build_scheduler().alphas_cumprod.to(DEVICE)
    draw = np.random.default_rng(step)  # other captions in every run
    texts = [[captions.caption(s, draw, None, keep) for keep in (1.0, 1.0, 0.9, 0.8, 0.6, 0.4)] for s in known]
    texts += pool["captions"]
    tokens = [tokenizer(t, padding="max_length", truncation=True, return_tensors="pt").input_ids for t in texts]
    empty = tokenizer("", padding="max_length", return_tensors="pt").input_ids[0]
    rng = torch.Generator().manual_seed(step + 11)
    clock, saved = Clock(args.minutes), 0.0
    losses: list[tuple[float, ...]] = []
    while True:
        clock.tick()
        lr = (args.lr or 1e-3) * min(1.0, (step + 1) / 300) * max(0.05, min(1.0, 3 * clock.left))
        for group in opt.param_groups:
            group["lr"] = lr
        crop = torch.rand(batch, generator=rng) < 0.35
        index = torch.randint(half, (batch,), generator=rng) + half * crop
        z = latents[index].float().to(DEVICE)
        # Crops are for refinement: most of their steps are low-noise ones. Scenes are composed where noise hides a disc of
        # 5×5 latents, from 800 on: half of theirs lie there (logit-normal, as in arXiv:2403.03206, 3.1).
        t = torch.rand(batch, generator=rng)
        composing = torch.sigmoid(1.5 + torch.randn(batch, generator=rng))
        often = torch.rand(batch, generator=rng) < 0.75
        t = torch.where(often, torch.where(crop, t * 0.6, composing), t)
        t = (t * 1000).long().clamp_max(999).to(DEVICE)
        choice = torch.randint(6, (batch,), generator=rng)
        ids = torch.stack([tokens[i][c] for i, c in zip(index.tolist(), choice.tolist(), strict=True)])
        silent = torch.rand(batch, generator=rng) < 0.1
        ids[silent] = empty
        a = alphas[t].view(-1, 1, 1, 1)
        noise = torch.randn(z.shape, generator=rng).to(DEVICE)
        noisy, target = a.sqrt() * z + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * z
        with torch.autocast("cuda", torch.bfloat16, enabled=DEVICE == "cuda"):
            said = text(ids.to(DEVICE)).last_hidden_state
            predicted = unet(noisy, t, said).sample
        loss = F.mse_loss(predicted.float(), target)
        scene = torch.where(crop, -1, index)
        read, understood = reader.loss(scene), words.loss(said, torch.where(silent, -1, scene))
        for p in parameters:
            p.grad = None
        (loss + 0.3 * read + 0.1 * understood).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        opt.step()
        muon.step(lr)
        step += 1
        ema.update(step)
        losses.append((loss.item(), read.item(), understood.item()))
        done = not clock.left
        if step % 100 == 0 or done:
            noise_loss, read_loss, words_loss = np.mean(losses[-100:], axis=0)
            print(
                f"unet step {step} loss {noise_loss:.4f} layout {read_loss:.3f} words {words_loss:.3f} {clock.spent:.0f} s",
                flush=True,
            )
        if done or clock.spent - saved > SAVE_EVERY:
            save(
                path, unet=unet.state_dict(), text=text.state_dict(), opt=opt.state_dict(), momentum=muon.momentum,
                head=reader.head.state_dict(), words=words.heads.state_dict(), ema=ema.mean, step=step,
            )  # fmt: skip
            saved = clock.spent
        if done:
            return


def export(args: argparse.Namespace) -> None:
    """Write the averaged weights as a diffusers folder of fp16 safetensors."""
    tokenizer = get_tokenizer(args.work)
    vae, unet, text = load_vae(args.work), model.build_unet(), model.build_text_encoder(len(tokenizer))
    state = torch.load(args.work / "unet.pt", map_location="cpu")
    with torch.no_grad():
        for p, m in zip([*unet.parameters(), *text.parameters()], state["ema"], strict=True):
            p.copy_(m)
    pipeline = StableDiffusionPipeline(
        vae=vae.half().cpu(), text_encoder=text.half(), tokenizer=tokenizer, unet=unet.half(),
        scheduler=model.build_scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(args.out)
    size = sum(f.stat().st_size for f in args.out.rglob("*.safetensors"))
    print(json.dumps({"out": str(args.out), "safetensors_bytes": size, "unet_step": state["step"]}))


if __name__ == "__main__":
    main()
