"""π0.5 and π0: a vision-language model that denoises a chunk of actions by flow matching.

Sources: openpi `models/pi0.py` (embed_prefix, embed_suffix, compute_loss, sample_actions), the
original; LeRobot 0.6.1 `modeling_pi05.py` and `modeling_pi0.py`, whose results it reproduces;
π0 (arXiv 2410.24164), π0.5 (arXiv 2504.16054).

Time runs against the papers', as in the code: t = 1 is noise, t = 0 is the action.

Precision. In bfloat16 the image tower's blocks and projector, the token embedding and the matrices
of both experts are bfloat16 (openpi's rule; LeRobot keeps the whole tower in float32, for 0.8 GB
more). In float32 stay all norms with AdaRMS's modulations, patch and position embedding, the time
MLP and the action and state projections. Rotary angles, x_t, v_t and the Euler steps are float32
in any case.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pi05_ros.policy.config import PolicyConfig
from pi05_ros.policy.flow import Schedule, integrate, make_schedule, sinusoidal_embedding
from pi05_ros.policy.gemma import KeyValue, Rotary, TwoExperts, block_mask, rotary
from pi05_ros.policy.guidance import Guide
from pi05_ros.policy.layers import Linear
from pi05_ros.policy.shapes import check_prefix, check_shape, check_state
from pi05_ros.policy.siglip import VisionTower
from pi05_ros.policy.stopwatch import Mark, unmarked

# `action_` is in the projections' names, and not in `experts.action.`.
FLOAT32_PARTS = ("norm", "modulation", "patch", "position", "action_", "time_", "state_")


def parameter_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that the named parameter has when the model runs in `dtype`."""
    return torch.float32 if any(part in name for part in FLOAT32_PARTS) else dtype


class Prefix(NamedTuple):
    """All that the denoising steps need of pictures and prompt."""

    cache: list[KeyValue]
    suffix_angles: Rotary
    suffix_mask: Tensor | None
    last_hidden: Tensor | None = None
    """[B, T, vlm width], only where `encode_prefix` was asked for it."""


class Pi0(nn.Module):
    """The network of π0.5 (AdaRMS, state in the prompt) or π0 (state token), by `config.kind`."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config
        self.adaptive = config.kind == "pi05"
        sizes = config.sizes
        self.vision = VisionTower(sizes)
        self.embedder = nn.Embedding(sizes.vocab, sizes.vlm.width)
        nn.init.normal_(self.embedder.weight, std=sizes.vlm.width**-0.5)
        self.experts = TwoExperts(sizes.vlm, sizes.exp, adaptive=self.adaptive)
        width = sizes.exp.width
        self.action_in_proj = Linear(config.max_action_dim, width)
        self.action_out_proj = Linear(width, config.max_action_dim)
        if self.adaptive:
            self.time_mlp_in = Linear(width, width)
            self.time_mlp_out = Linear(width, width)
        else:
            self.state_proj = Linear(config.max_state_dim, width)
            self.action_time_mlp_in = Linear(2 * width, width)
            self.action_time_mlp_out = Linear(width, width)

    @property
    def device(self) -> torch.device:
        return self.embedder.weight.device

    def embed_prefix(
        self, images: Tensor, image_masks: Tensor, tokens: Tensor, token_masks: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens of every camera in order, then the prompt: [B, T, width], and [B, T] valid."""
        return self._join(self.encode_images(images), image_masks, tokens, token_masks)

    def encode_images(self, images: Tensor) -> Tensor:
        """[B, n_cameras, 3, side, side] → [B, n_cameras · image tokens, width], unscaled."""
        batch, cameras = images.shape[:2]
        if cameras == 0:
            return images.new_zeros((batch, 0, self.config.sizes.vlm.width))
        features: Tensor = self.vision(images.flatten(0, 1))
        return features.unflatten(0, (batch, cameras)).flatten(1, 2)

    def _join(
        self, features: Tensor, image_masks: Tensor, tokens: Tensor, token_masks: Tensor
    ) -> tuple[Tensor, Tensor]:
        # text embeddings are scaled by sqrt(width), image features are not
        text = self.embedder(tokens).float() * math.sqrt(self.config.sizes.vlm.width)
        seen = image_masks.repeat_interleave(
            self.config.sizes.image_tokens, dim=1, output_size=features.shape[1]
        )
        return torch.cat((features.float(), text), dim=1), torch.cat((seen, token_masks), dim=1)

    def encode_prefix(
        self,
        images: Tensor,
        image_masks: Tensor,
        tokens: Tensor,
        token_masks: Tensor,
        pack: bool = True,
        last_hidden: bool = False,
        mark: Mark = unmarked,
    ) -> Prefix:
        """Run pictures and prompt once; `denoise` can then be called any number of times.

        Args:
            images: [B, n_cameras, 3, side, side] in [-1, 1].
            image_masks: [B, n_cameras] bool, False for a missing camera.
            tokens: [B, L] int64.
            token_masks: [B, L] bool, False for padding.
            pack: leave out the cameras and tokens that are masked in the whole batch. Nobody
                attends to them and they advance no position, so the result is the same.
            last_hidden: also compute the language model's last hidden state.
            mark: told when "vision" and "prefix" are done.

        Raises:
            ValueError: shapes that do not fit the network or each other; nothing but padding.
        """
        check_prefix(self.config, images, image_masks, tokens, token_masks)
        if pack:
            used, kept = image_masks.any(0), token_masks.any(0)
            images, image_masks = images[:, used], image_masks[:, used]
            tokens, token_masks = tokens[:, kept], token_masks[:, kept]
            if images.shape[1] + tokens.shape[1] == 0:
                raise ValueError("every camera and every token is masked: nothing to look at")
        features = self.encode_images(images)
        mark("vision")
        masked = not (bool(image_masks.all()) and bool(token_masks.all()))
        prefix = self.encode_tokens(
            features, image_masks, tokens, token_masks, masked=masked, last_hidden=last_hidden
        )
        mark("prefix")
        return prefix

    def encode_tokens(
        self,
        features: Tensor,
        image_masks: Tensor,
        tokens: Tensor,
        token_masks: Tensor,
        *,
        masked: bool = True,
        last_hidden: bool = False,
    ) -> Prefix:
        """`encode_prefix` behind the image tower; it never waits for the device.

        Args:
            features: [B, n_cameras · image tokens, width] from `encode_images`.
            image_masks, tokens, token_masks, last_hidden: see `encode_prefix`.
            masked: whether the masks have a False; without one, attention needs no mask.
        """
        embeddings, valid = self._join(features, image_masks, tokens, token_masks)
        # Padding does not advance the position.
        positions = (valid.long().cumsum(1) - 1).clamp(min=0)
        head_dim = self.config.sizes.vlm.head_dim
        # The prefix is one block: every valid token is seen by every token.
        cache, hidden = self.experts.prefix(
            embeddings,
            rotary(positions, head_dim),
            valid[:, None, None, :] if masked else None,
            last_hidden,
        )
        length = self.config.horizon + (not self.adaptive)
        suffix_positions = valid.sum(1, keepdim=True) + torch.arange(length, device=valid.device)
        return Prefix(
            cache,
            rotary(suffix_positions, head_dim),
            self._suffix_mask(valid, length, masked),
            hidden,
        )

    def _suffix_mask(self, valid: Tensor, length: int, masked: bool) -> Tensor | None:
        """Broadcastable to [B, 1, S, T + S]; None where every suffix token sees everything.

        Actions are one block, and so is π0's state before them.
        """
        seen = torch.cat((valid, valid.new_ones(len(valid), length)), dim=1)
        if self.adaptive:
            return seen[:, None, None, :] if masked else None
        order = torch.arange(valid.shape[1] + length, device=valid.device) - valid.shape[1]
        starts = (order == 0) | (order == 1)
        return block_mask(seen, starts)[:, :, valid.shape[1] :]

    def embed_time(self, times: Tensor) -> Tensor:
        """[N] → [N, width]: π0.5's AdaRMS condition, or π0's plain sinusoid."""
        config = self.config
        embedding = sinusoidal_embedding(
            times, config.sizes.exp.width, config.min_period, config.max_period
        )
        if not self.adaptive:
            return embedding
        return F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(embedding))))

    def time_features(self, times: Tensor) -> Tensor:
        """Everything that depends on the time alone, for [N] times at once.

        π0.5: [N, 2 · depth + 1, 3, width] modulations of the expert's norms. π0: [N, width].
        """
        embedding = self.embed_time(times)
        return self.experts.action.modulations(embedding) if self.adaptive else embedding

    def embed_suffix(self, x_t: Tensor, time_features: Tensor, state: Tensor | None) -> Tensor:
        """[B, H, action dim] → [B, H, width]; in π0 [B, 1 + H, width], with time and state."""
        actions = self.action_in_proj(x_t)
        if self.adaptive:
            return actions
        if state is None:
            raise ValueError("π0 needs the state [B, max_state_dim]")
        time = time_features.to(actions.dtype)[:, None].expand_as(actions)
        mixed = self.action_time_mlp_in(torch.cat((actions, time), dim=-1))
        return torch.cat(
            (self.state_proj(state)[:, None], self.action_time_mlp_out(F.silu(mixed))), dim=1
        )

    def denoise(
        self, prefix: Prefix, x_t: Tensor, time_features: Tensor, state: Tensor | None = None
    ) -> Tensor:
        """The velocity v(x_t, t).

        Args:
            prefix: from `encode_prefix`.
            x_t: [B, H, action dim] noisy actions.
            time_features: of [B] times, or of one time for the whole batch; π0.5 also takes
                one per token, [B or 1, norms, 3, H, width].
            state: [B, max_state_dim], π0 alone.

        Returns:
            [B, H, action dim] float32.
        """
        hidden = self.experts.suffix(
            self.embed_suffix(x_t, time_features, state),
            prefix.cache,
            prefix.suffix_angles,
            prefix.suffix_mask,
            time_features if self.adaptive else None,
        )
        return self.action_out_proj(hidden[:, -self.config.horizon :]).float()

    def schedule(self, num_steps: int) -> Schedule:
        """All that sampling in `num_steps` Euler steps needs of the times alone."""
        return make_schedule(self.time_features, num_steps, self.device)

    @torch.no_grad()
    def sample_actions(
        self,
        images: Tensor,
        image_masks: Tensor,
        tokens: Tensor,
        token_masks: Tensor,
        state: Tensor | None = None,
        noise: Tensor | None = None,
        num_steps: int = 10,
        *,
        generator: torch.Generator | None = None,
        pack: bool = True,
        guide: Guide | None = None,
        schedule: Schedule | None = None,
        mark: Mark = unmarked,
    ) -> Tensor:
        """Integrate from noise at t = 1 to actions at t = 0 in equal Euler steps.

        Args:
            images, image_masks, tokens, token_masks, pack: see `encode_prefix`.
            state: [B, max_state_dim], π0 alone.
            noise: [B, H, action dim]; drawn from `generator` where it is not given.
            num_steps: Euler steps.
            guide: pulls the actions towards those of a chunk before.
            schedule: from `schedule`, made once for many calls, instead of `num_steps`.
            mark: told when "vision", "prefix" and "denoise" are done.

        Returns:
            [B, H, action dim] normalised actions, float32, not clipped.

        Raises:
            ValueError: shapes that do not fit, a missing state, num_steps below 1.
        """
        if schedule is None:
            schedule = self.schedule(num_steps)
        check_prefix(self.config, images, image_masks, tokens, token_masks)
        check_state(self.config, state, len(tokens))
        # the guide may differentiate, and what inference mode has made cannot be
        with torch.inference_mode(guide is None or not guide.differentiates), torch.no_grad():
            x_t = self._noise(len(tokens), noise, generator)
            state = None if state is None else state.clone()
            prefix = self.encode_prefix(images, image_masks, tokens, token_masks, pack, mark=mark)
            x_t = integrate(partial(self.denoise, prefix, state=state), x_t, schedule, guide)
        mark("denoise")
        return x_t

    def loss(
        self,
        images: Tensor,
        image_masks: Tensor,
        tokens: Tensor,
        token_masks: Tensor,
        actions: Tensor,
        state: Tensor | None = None,
        noise: Tensor | None = None,
        time: Tensor | None = None,
        reduction: str = "none",
    ) -> Tensor:
        """Squared error of the velocity at x_t = t · noise + (1 - t) · actions.

        Args:
            actions: [B, H, action dim] normalised, padded with zeros.
            noise: [B, H, action dim], drawn where it is not given.
            time: [B] in (0, 1], drawn from Beta(1.5, 1) · 0.999 + 0.001 where it is not given.
            reduction: "none", or "mean" over everything, padded dimensions included (openpi).

        Returns:
            [B, H, action dim] for "none", else a scalar.

        Raises:
            ValueError: an unknown reduction, shapes that do not fit, a missing state.
        """
        if reduction not in ("none", "mean"):
            raise ValueError(f'reduction must be "none" or "mean", not {reduction!r}')
        check_prefix(self.config, images, image_masks, tokens, token_masks)
        batch = len(tokens)
        check_state(self.config, state, batch)
        check_shape("actions", actions, self._chunk_shape(batch))
        actions = actions.to(torch.float32)
        noise = self._noise(batch, noise, None)
        time = self._draw_time(batch) if time is None else time.to(torch.float32)
        check_shape("time", time, (batch,))
        t = time[:, None, None]
        prefix = self.encode_prefix(images, image_masks, tokens, token_masks)
        velocity = self.denoise(
            prefix, t * noise + (1 - t) * actions, self.time_features(time), state
        )
        error = (velocity - (noise - actions)).square()
        return error.mean() if reduction == "mean" else error

    def _draw_time(self, batch: int) -> Tensor:
        config = self.config
        alpha = torch.tensor(config.time_alpha, device=self.device)
        beta = torch.tensor(config.time_beta, device=self.device)
        draw = torch.distributions.Beta(alpha, beta).sample((batch,))
        return draw * config.time_scale + config.time_offset

    def _noise(self, batch: int, noise: Tensor | None, generator: torch.Generator | None) -> Tensor:
        shape = self._chunk_shape(batch)
        if noise is None:
            return torch.randn(shape, generator=generator, device=self.device)
        check_shape("noise", noise, shape)
        return noise.to(torch.float32)

    def _chunk_shape(self, batch: int) -> tuple[int, ...]:
        return (batch, self.config.horizon, self.config.max_action_dim)
