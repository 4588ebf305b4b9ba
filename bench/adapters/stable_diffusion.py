"""Stable Diffusion 1.x and 2.x in the format of diffusers: pictures from text, and the white box behind them."""

from __future__ import annotations

import copy
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bench.adapters import edits
from bench.capabilities import Condition
from bench.text import say
from bench.types import Error, UsageError, Weights
from bench.weights import load_weights, open_folder

if TYPE_CHECKING:
    from torch import Tensor

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "euler": "EulerDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
}
DTYPES = ("float32", "float16", "bfloat16")
PARTS = ("tokenizer", "text_encoder", "unet", "vae", "scheduler")


class StableDiffusion:
    """A pipeline folder, or a hub id that was fetched, with parts of it exchanged where `unet`, `text_encoder` or
    `lora` name an edit (see `bench.adapters.edits`).

    Picture i depends on prompts[i] and seeds[i] alone: the initial latent, and the noise of the steps where a
    scheduler draws any, come from one float32 CPU generator per item. Sums in another batch have another order: items
    may differ by about 1e-5 between batch sizes in float32. Prompts longer than `max_tokens` are cut; `tokens` counts.
    A safety checker is never loaded. Networks are frozen and in evaluation mode until somebody trains them.

    `guidance` w weighs e_0 + w (e_p - e_0) (classifier-free guidance, arXiv 2207.12598, as Stable Diffusion scales
    it): 0 is unconditional, 1 is plain conditional. `size` None is the size that the U-Net was trained at.
    """

    def __init__(
        self,
        weights: Weights,
        unet: Weights | None = None,
        text_encoder: Weights | None = None,
        lora: Weights | None = None,
        guidance: float = 7.5,
        steps: int = 50,
        scheduler: Literal["ddim", "ddpm", "euler", "lms", "pndm"] = "ddim",
        size: int | None = None,  # px, both sides
        dtype: Literal["float32", "float16", "bfloat16"] = "float32",
        *,
        pickle: Literal["refuse", "allow"] = "refuse",  # of the edits; a folder never holds one
        device: str = "cpu",
    ):
        import torch

        if dtype not in DTYPES:
            raise UsageError(f"stable-diffusion: dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        if scheduler not in SCHEDULERS:
            raise UsageError(f"stable-diffusion: scheduler {scheduler!r} is not one of {', '.join(SCHEDULERS)}")
        folder = open_folder(weights)  # looks through the folder before a library sees it
        self.safety_checker = _check_parts(folder, weights)
        self.guidance, self.steps, self.device = _guidance(guidance), steps, device

        self._scheduler = _scheduler(folder, scheduler)
        self.unet = _diffusers_part(folder, "unet", "UNet2DConditionModel")
        self.vae = _diffusers_part(folder, "vae", "AutoencoderKL")
        self.text_encoder = _text_encoder(folder)
        self.tokenizer = _tokenizer(folder)
        self.prediction_type = self._scheduler.config.prediction_type  # "epsilon" or "v_prediction"
        self.num_timesteps = self._scheduler.config.num_train_timesteps
        self.alphas_cumprod = self._scheduler.alphas_cumprod.double()  # [num_timesteps]
        self._check_together(weights)

        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)  # px of a picture's side per latent
        self.size = self._native_size(weights) if size is None else size
        self.latent_shape(self.size)
        self.timesteps(steps)

        self.changes: list[edits.Change] = []  # what was exchanged
        for part, source in (("unet", unet), ("text_encoder", text_encoder)):
            if source:
                self.changes.append(edits.replace(part, self.modules()[part], source, pickle))
        if lora:
            self.changes += edits.merge_lora(self.modules(), lora, pickle)
        for line in (*self.changes, *(["safety checker: present, not loaded"] if self.safety_checker else [])):
            say(str(line))
        for network in (self.unet, self.vae, self.text_encoder):
            torch.nn.Module.to(network, device, getattr(torch, dtype))  # that of diffusers warns at each call
            network.eval().requires_grad_(False)

    # -- pictures from text

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """float32 [B, 3, size, size] in [0, 1]; raises Error where numbers overflowed."""
        import torch

        if len(prompts) != len(seeds):
            raise Error(f"stable-diffusion: {len(prompts)} prompts with {len(seeds)} seeds")
        with torch.no_grad():
            z = self.sample(self.condition(self.tokenize(prompts)), seeds, self.guidance, self.steps)
            images = self.from_latent(z)
        for what, x in (("latents of the U-Net", z), ("pictures of the VAE", images)):
            bad = [seed for seed, good in zip(seeds, x.flatten(1).isfinite().all(1).tolist(), strict=True) if not good]
            if bad:
                raise Error(
                    f"stable-diffusion: NaN or infinity in {len(bad)} of {len(x)} {what}, seed {bad[0]} first",
                    hint="half precision overflows in some VAEs: -m dtype=float32, or bfloat16",
                )
        return (images * 0.5 + 0.5).clamp(0, 1)

    def tokens(self, prompts: Sequence[str]) -> list[int]:
        """How many tokens each prompt has, with the marks of begin and end; what exceeds `max_tokens` is cut."""
        return [len(ids) for ids in self.tokenizer(list(prompts), truncation=False, verbose=False).input_ids]

    @property
    def max_tokens(self) -> int:
        """Tokens that the text encoder reads, with the marks of begin and end."""
        return min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)

    # -- white box: gradients flow unless the caller switches them off

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """int64 [B, max_tokens] on the device: begin, prompt, end, padding; longer prompts are cut."""
        options = {"padding": "max_length", "max_length": self.max_tokens, "truncation": True}
        return self.tokenizer(list(prompts), **options, return_tensors="pt").input_ids.to(self.device)

    def detokenize(self, ids: Tensor) -> list[str]:
        """The text between begin and the first end of each row; it need not tokenize to the same ids."""
        texts = []
        for row in ids.tolist():
            row = row[1:] if row[:1] == [self.tokenizer.bos_token_id] else row
            end = row.index(self.tokenizer.eos_token_id) if self.tokenizer.eos_token_id in row else len(row)
            texts.append(self.tokenizer.decode(row[:end]).strip())
        return texts

    def token_embeddings(self) -> Tensor:
        """[V, d], the table of this text encoder."""
        return self.text_encoder.get_input_embeddings().weight

    def condition(self, ids: Tensor, embeddings: Tensor | None = None) -> Condition:
        """hidden [B, L, c] after the last layer norm, pooled [B, c]; `embeddings` [B, L, d] replace those of the ids.

        With embeddings, ids only say where the end is, which decides what is pooled.
        """
        hook = None
        if embeddings is not None:  # CLIPTextModel takes none itself
            layer = self.text_encoder.get_input_embeddings()
            if embeddings.shape != (*ids.shape, layer.embedding_dim):
                shapes = f"{list(embeddings.shape)} for ids {list(ids.shape)}"
                raise Error(f"stable-diffusion: embeddings {shapes} and {layer.embedding_dim} numbers a token")
            hook = layer.register_forward_hook(lambda module, inputs, output: embeddings.to(output))
        try:
            found = self.text_encoder(input_ids=ids.to(self.device))
        finally:
            if hook is not None:
                hook.remove()
        return Condition(found.last_hidden_state, found.pooler_output)

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """(c, size / factor, size / factor); raises Error where that is not whole."""
        if size < 1 or size % self.factor:
            raise Error(
                f"stable-diffusion: {size} px is not a multiple of the factor {self.factor}",
                hint=f"choose a size that is a multiple of {self.factor}",
            )
        return self.unet.config.in_channels, size // self.factor, size // self.factor

    def to_latent(self, images: Tensor) -> Tensor:
        """float32 [B, 3, H, W] in [-1, 1] -> float32 [B, c, h, w]: the posterior's mean, scaled."""
        x = images.to(self.device, self.vae.dtype)
        return self.vae.encode(x).latent_dist.mean.float() * self.vae.config.scaling_factor

    def from_latent(self, z: Tensor) -> Tensor:
        """float32 [B, 3, H, W], about [-1, 1], not clamped."""
        z = z.to(self.device, self.vae.dtype)
        return self.vae.decode(z / self.vae.config.scaling_factor).sample.float()

    def add_noise(self, z: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = sqrt(a_t) z + sqrt(1 - a_t) noise, a_t the cumulative product of 1 - beta; t int64 [B] from 0."""
        signal, sigma = self._levels(t, z)
        return signal * z + sigma * noise

    def target(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The noise, or the velocity sqrt(a_t) noise - sqrt(1 - a_t) z0 (arXiv 2202.00512, section 4)."""
        if self.prediction_type == "epsilon":
            return noise
        signal, sigma = self._levels(t, z0)
        return signal * noise - sigma * z0

    def predict(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The U-Net's output for z_t [B, c, h, w] at t [B], float32, without guidance."""
        z, hidden = z_t.to(self.device, self.unet.dtype), condition.hidden.to(self.device, self.unet.dtype)
        return self.unet(z, t.to(self.device), encoder_hidden_states=hidden).sample.float()

    def timesteps(self, steps: int) -> Tensor:
        """Where `sample` calls the U-Net, from the noisiest on: [steps], or one more for pndm, which has one twice."""
        return self._schedule(steps).timesteps

    def sample(
        self, condition: Condition, seeds: Sequence[int], guidance: float, steps: int, stop_at: int | None = None
    ) -> Tensor:
        """float32 [B, c, h, w], the latents of pictures of `size` px.

        `stop_at` k ends before `timesteps(steps)[k]` and returns what `predict` would be given there: 0 is pure noise,
        `len(timesteps(steps))` or None the end. Under torch.no_grad no graph is kept; else it holds every step.
        """
        import torch

        hidden = condition.hidden
        if len(hidden) != len(seeds):
            raise Error(f"stable-diffusion: {len(hidden)} conditions with {len(seeds)} seeds")
        scheduler = self._schedule(steps)
        end = len(scheduler.timesteps) if stop_at is None else stop_at
        if not 0 <= end <= len(scheduler.timesteps):
            raise Error(f"stable-diffusion: stop_at {stop_at} is not in 0..{len(scheduler.timesteps)}")
        guidance = _guidance(guidance)
        if guidance != 1:
            empty = self.condition(self.tokenize([""])).hidden
            hidden = torch.cat([empty.expand(len(hidden), -1, -1), hidden])

        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        shape = self.latent_shape(self.size)
        z = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(self.device)
        z = z * scheduler.init_noise_sigma
        draws = "generator" in inspect.signature(scheduler.step).parameters
        options = {"generator": generators} if draws else {}
        for t in scheduler.timesteps[:end]:
            x = scheduler.scale_model_input(z, t)
            if guidance == 1:
                step = self.predict(x, t, Condition(hidden))
            else:
                without, with_prompt = self.predict(torch.cat([x, x]), t, Condition(hidden)).chunk(2)
                step = without + guidance * (with_prompt - without)
            z = scheduler.step(step, t, z, **options).prev_sample
        return z if end == len(scheduler.timesteps) else scheduler.scale_model_input(z, scheduler.timesteps[end])

    def modules(self) -> Mapping[str, Any]:
        """What recipes train; turn gradients on for what is to be trained."""
        return {"unet": self.unet, "text_encoder": self.text_encoder}

    def clone(self) -> StableDiffusion:
        """A frozen copy of U-Net and text encoder; tokenizer and VAE are shared."""
        twin = copy.copy(self)
        twin.unet = copy.deepcopy(self.unet).eval().requires_grad_(False)
        twin.text_encoder = copy.deepcopy(self.text_encoder).eval().requires_grad_(False)
        return twin

    # -- inside

    def _levels(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(a_t) and sqrt(1 - a_t) as [B, 1, 1, 1]."""
        a = self.alphas_cumprod.to(t.device)[t].reshape(-1, 1, 1, 1)
        return a.sqrt().to(like), (1 - a).sqrt().to(like)

    def _schedule(self, steps: int) -> Any:
        """A scheduler of its own for each trajectory: most of them remember earlier steps."""
        if not 1 <= steps <= self.num_timesteps:
            raise Error(f"stable-diffusion: {steps} steps are not in 1..{self.num_timesteps}")
        scheduler = copy.deepcopy(self._scheduler)
        scheduler.set_timesteps(steps)
        first = float(scheduler.timesteps.max())
        if first > self.num_timesteps - 1:  # the offset of Stable Diffusion's schedulers leads out of their tables
            known = f"the model knows 0..{self.num_timesteps - 1}"
            raise Error(f"stable-diffusion: {steps} steps begin at time step {first:g}; {known}", hint="take fewer")
        return scheduler

    def _native_size(self, weights: str) -> int:
        """px of a side of the pictures that the U-Net was trained on."""
        sides = self.unet.config.sample_size
        sides = sides if isinstance(sides, list | tuple) else [sides, sides]
        if len(set(sides)) != 1 or not isinstance(sides[0], int):
            what = f"its U-Net's sample_size is {self.unet.config.sample_size}, no side of a square"
            raise Error(f"stable-diffusion: {weights}: {what}", hint="-m size=512 names the side in px")
        return sides[0] * self.factor

    def _check_together(self, weights: str) -> None:
        """Do the parts fit each other?"""
        unet, text = self.unet.config, self.text_encoder.config
        latents, table = self.vae.config.latent_channels, len(self.tokenizer)
        kind = unet.addition_embed_type or ("embedded guidance" if unet.time_cond_proj_dim else None)
        faults = {
            f"the U-Net takes {unet.in_channels} channels and the VAE makes {latents}": unet.in_channels != latents,
            f"the U-Net attends to {unet.cross_attention_dim} numbers a token and the text encoder makes "
            f"{text.hidden_size}": unet.cross_attention_dim != text.hidden_size,
            f"the tokenizer has {table} tokens and the text encoder {text.vocab_size}": table > text.vocab_size,
            f"the U-Net wants conditions of kind {kind}": kind is not None,
            f"the prediction type {self.prediction_type!r} is not of SD 1.x or 2.x": self.prediction_type
            not in ("epsilon", "v_prediction"),
        }
        for fault, present in faults.items():
            if present:
                raise Error(
                    f"stable-diffusion: {weights}: {fault}", hint="read are text-to-image pipelines of SD 1 and 2"
                )


def _guidance(value: float) -> float:
    if not 0 <= value < math.inf:
        raise Error(f"stable-diffusion: guidance {value} must be 0 or a positive number")
    return value


# -- parts of a folder


def _check_parts(folder: Path, weights: str) -> bool:
    """Raises Error where a part is missing; True where the folder names a safety checker."""
    for part in PARTS:
        if not (folder / part).is_dir():
            raise Error(
                f"stable-diffusion: {weights} has no folder {part}",
                hint="name a folder that StableDiffusionPipeline.save_pretrained wrote",
            )
    return (folder / "safety_checker").is_dir()


def _config(folder: Path, part: str, name: str = "config.json") -> dict[str, Any]:
    try:
        found = json.loads((folder / part / name).read_text(encoding="utf-8-sig"))
    except OSError as e:
        raise Error(f"stable-diffusion: {folder / part / name} cannot be read: {e.strerror}") from None
    if not isinstance(found, dict):
        raise Error(f"stable-diffusion: {folder / part / name} holds no settings", hint="copy the part again")
    return found


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]


def _weights_file(folder: Path, part: str, stem: str) -> Path:
    """`stem.safetensors`, or else the one of half precision."""
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
        if (folder / part / name).is_file():
            return folder / part / name
    raise Error(f"stable-diffusion: {folder / part} has no {stem}.safetensors")


def _diffusers_part(folder: Path, part: str, name: str) -> Any:
    """A network of diffusers in float32, complete or refused."""
    import diffusers

    kind = _config(folder, part).get("_class_name")
    if kind != name:
        raise Error(f"stable-diffusion: {folder / part} holds {kind or 'no class'} instead of {name}")
    stem = "diffusion_pytorch_model"
    sharded = (folder / part / f"{stem}.safetensors.index.json").is_file()
    half = not sharded and _weights_file(folder, part, stem).name.endswith(".fp16.safetensors")
    try:
        network, loading = getattr(diffusers, name).from_pretrained(
            folder / part,
            variant="fp16" if half else None,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, TypeError, RuntimeError, KeyError) as e:
        raise Error(f"stable-diffusion: {folder / part} cannot be opened: {_first_line(e)}") from e
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[kind]:  # diffusers would leave random numbers in place of missing weights
            found = f"{len(loading[kind])} {kind.replace('_', ' ')}, {str(next(iter(loading[kind])))[:120]!r} first"
            raise Error(f"stable-diffusion: {folder / part} has {found}", hint="copy or convert the part again")
    return network


def _text_encoder(folder: Path) -> Any:
    """CLIP's text encoder in float32; names with and without `text_model.` are read, in any release of transformers."""
    from huggingface_hub import errors
    from transformers import CLIPTextConfig, CLIPTextModel

    config, part = _config(folder, "text_encoder"), folder / "text_encoder"
    if config.get("architectures") != ["CLIPTextModel"]:
        raise Error(f"stable-diffusion: {part} holds {config.get('architectures')} instead of CLIPTextModel")
    tensors = load_weights(_weights_file(folder, "text_encoder", "model"))
    try:
        network = CLIPTextModel(CLIPTextConfig.from_dict(config)).float()
    except (
        ValueError,
        TypeError,
        RuntimeError,
        AttributeError,
        getattr(errors, "StrictDataclassError", ValueError),
    ) as e:
        raise Error(f"stable-diffusion: {part} cannot be opened: {_first_line(e)}") from e
    network.load_state_dict(edits.match("text_encoder", network, tensors, str(part), whole=True))
    return network


def _tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    found = {path.name for path in (folder / "tokenizer").iterdir()}
    if not ("tokenizer.json" in found or {"vocab.json", "merges.txt"} <= found):  # transformers makes do with no words
        raise Error(
            f"stable-diffusion: {folder / 'tokenizer'} has neither tokenizer.json nor vocab.json and merges.txt",
            hint="copy the part again",
        )
    _config(folder, "tokenizer", "tokenizer_config.json")  # what pads prompts; transformers would guess
    try:
        return CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except (OSError, ValueError, TypeError, RuntimeError, KeyError) as e:
        raise Error(f"stable-diffusion: {folder / 'tokenizer'} cannot be opened: {_first_line(e)}") from e


def _scheduler(folder: Path, scheduler: str) -> Any:
    """A scheduler with the settings of the folder's own, mended as StableDiffusionPipeline mends them.

    Without that, DDIM made from the settings of another scheduler would clip latents as if they were pictures. PNDM
    leaves out the Runge-Kutta steps (PLMS), as Stable Diffusion's own settings say.
    """
    import diffusers

    settings = _config(folder, "scheduler", "scheduler_config.json")
    settings |= {"clip_sample": False, "steps_offset": 1, "skip_prk_steps": True}
    try:
        return getattr(diffusers, SCHEDULERS[scheduler]).from_config(settings)
    except (ValueError, TypeError, RuntimeError) as e:
        raise Error(f"stable-diffusion: {folder / 'scheduler'} cannot be opened: {_first_line(e)}") from e
