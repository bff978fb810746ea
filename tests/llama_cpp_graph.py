"""What llama.cpp does with a file of architecture granitehybrid, in NumPy, operation by operation.

Written from its sources (``src/models/granite-hybrid.cpp``, ``src/models/mamba-base.cpp``, ``ggml-cpu/ops.cpp``) as of
llama-cpp-python 0.3.36, and from nothing of ours: shapes and options come from the file alone, in float64.
"""

import numpy as np
from gguf import GGUFReader, dequantize


def silu(x):
    return x / (1 + np.exp(-x))


def rms_norm(x, weight, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


class GraniteHybrid:
    """A file; ``logits(ids)`` are those of all positions of one sequence, [L, V]."""

    def __init__(self, path):
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        self.tensors = {t.name: dequantize(t.data, t.tensor_type).astype(np.float64) for t in reader.tensors}
        self.types = {t.name: t.tensor_type.name for t in reader.tensors}
        assert fields["general.architecture"] == "granitehybrid"
        assert fields["tokenizer.ggml.model"] == "none", "the vocabulary's size is then read from the file"
        self.all_fields = fields
        self.fields = {key.removeprefix("granitehybrid."): value for key, value in fields.items()}
        for scale in ("embedding_scale", "residual_scale", "logit_scale"):
            assert scale not in self.fields
        assert self["ssm.inner_size"] == 2 * self["embedding_length"], "llama.cpp aborts otherwise"
        assert len(self["attention.head_count_kv"]) == self["block_count"]
        assert self.tensors["token_embd.weight"].shape == (self["vocab_size"], self["embedding_length"])

    def __getitem__(self, key):
        return self.fields[key]

    def of_layer(self, layer, name):
        return self.tensors[f"blk.{layer}.{name}"]

    def logits(self, ids):
        h_LD = self.tensors["token_embd.weight"][ids]
        eps = self["attention.layer_norm_rms_epsilon"]
        for layer, groups in enumerate(self["attention.head_count_kv"]):
            normed_LD = rms_norm(h_LD, self.of_layer(layer, "attn_norm.weight"), eps)
            # A layer is recurrent if and only if it has no key-value heads.
            h_LD = h_LD + (self.attention(layer, normed_LD, groups) if groups else self.mamba2(layer, normed_LD))
            normed_LD = rms_norm(h_LD, self.of_layer(layer, "ffn_norm.weight"), eps)
            gate = silu(normed_LD @ self.of_layer(layer, "ffn_gate.weight").T)
            up = normed_LD @ self.of_layer(layer, "ffn_up.weight").T
            h_LD = h_LD + (gate * up) @ self.of_layer(layer, "ffn_down.weight").T
        head = self.tensors.get("output.weight", self.tensors["token_embd.weight"])
        return rms_norm(h_LD, self.tensors["output_norm.weight"], eps) @ head.T

    def attention(self, layer, x_LD, groups):
        length, heads, width = len(x_LD), self["attention.head_count"], self["attention.key_length"]

        def projected(name, count):
            y = x_LD @ self.of_layer(layer, f"attn_{name}.weight").T
            y = y + self.tensors.get(f"blk.{layer}.attn_{name}.bias", 0)
            return y.reshape(length, count, width)

        q, k, v = projected("q", heads), projected("k", groups), projected("v", groups)
        # Absent, the key is true for this architecture; the converter of llama.cpp writes false.
        if self.fields.get("rope.scaling.finetuned", True):
            q, k = self.rotated(q), self.rotated(k)
        k, v = (np.repeat(y, heads // groups, 1) for y in (k, v))
        scores = np.einsum("lhp,mhp->hlm", q, k) * self["attention.scale"]
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        y = np.einsum("hlm,mhp->lhp", weights, v).reshape(length, -1)
        return y @ self.of_layer(layer, "attn_output.weight").T + self.tensors.get(f"blk.{layer}.attn_output.bias", 0)

    def rotated(self, x_LHP):
        """Normal RoPE: pairs of consecutive elements."""
        width = self["rope.dimension_count"]
        frequency = self["rope.freq_base"] ** (-np.arange(0, width, 2) / width)
        frequency = frequency / self.tensors.get("rope_freqs.weight", np.ones(width // 2))
        angle = (np.arange(len(x_LHP))[:, None] * frequency)[:, None]
        even, odd = x_LHP[..., 0::2], x_LHP[..., 1::2]
        turned = np.empty_like(x_LHP)
        turned[..., 0::2] = even * np.cos(angle) - odd * np.sin(angle)
        turned[..., 1::2] = even * np.sin(angle) + odd * np.cos(angle)
        return turned

    def mamba2(self, layer, x_LD):
        inner, states = self["ssm.inner_size"], self["ssm.state_size"]
        heads, groups, taps = self["ssm.time_step_rank"], self["ssm.group_count"], self["ssm.conv_kernel"]
        width, length, mixed = inner // heads, len(x_LD), inner + 2 * groups * states
        z_xBC_dt = x_LD @ self.of_layer(layer, "ssm_in.weight").T
        assert z_xBC_dt.shape[1] == inner + mixed + heads
        z, xBC, dt = z_xBC_dt[:, :inner], z_xBC_dt[:, inner:-heads], z_xBC_dt[:, -heads:]
        padded = np.concatenate([np.zeros((taps - 1, mixed)), xBC])
        windows = np.stack([padded[t : t + length] for t in range(taps)], -1)
        xBC = silu(
            (windows * self.of_layer(layer, "ssm_conv1d.weight")).sum(-1) + self.of_layer(layer, "ssm_conv1d.bias")
        )
        x = xBC[:, :inner].reshape(length, heads, width)
        b, c = (part.reshape(length, groups, states) for part in np.split(xBC[:, inner:], 2, 1))
        b, c = (np.repeat(part, heads // groups, 1) for part in (b, c))
        dt = np.log1p(np.exp(dt + self.of_layer(layer, "ssm_dt.bias")))
        a, d = self.of_layer(layer, "ssm_a"), self.of_layer(layer, "ssm_d")
        assert a.shape == d.shape == (heads, 1)
        state, y = np.zeros((heads, width, states)), np.empty((length, heads, width))
        for t in range(length):
            decay = np.exp(dt[t][:, None] * a)[..., None]
            state = state * decay + (x[t] * dt[t][:, None])[..., None] * b[t][:, None]
            y[t] = (state * c[t][:, None]).sum(-1) + d * x[t]
        y = y.reshape(length, inner) * silu(z)
        y = rms_norm(
            y.reshape(length, groups, inner // groups),
            self.of_layer(layer, "ssm_norm.weight"),
            self["attention.layer_norm_rms_epsilon"],
        )
        return y.reshape(length, inner) @ self.of_layer(layer, "ssm_out.weight").T
