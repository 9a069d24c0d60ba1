"""Linen and NNX models of published packages, in small sizes and as they are."""

from collections.abc import Callable
from typing import Any

from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp

from families import (
    BATCH,
    Case,
    CLASSES,
    family,
    filled,
    labels_like,
    linen,
    normal,
    of_linen,
    of_nnx,
    tokens,
)

WIDTH, LENGTH, VOCABULARY = 16, 5, 11
BATCH_STATS = {"mutable": ["batch_stats"]}
DROPOUT = {"dropout": jax.random.key(4)}

# ---------------------------------------------------------------- Hugging Face


def hugging_face(name: str, config: Any, inputs: Any, call: Any, **fields: Any) -> Case:
    """Return the case of a Flax model of `transformers`, in training mode with its dropout.

    Args:
      name: Of its class, less "Flax".
      config: Of the model, small.
      inputs: A batch.
      call: Maps the inputs to the arguments of the module.
      **fields: Of the case.
    """
    import transformers

    remat = fields.pop("gradient_checkpointing", False)
    options = {"gradient_checkpointing": True} if remat else {}
    kind = getattr(transformers, f"Flax{name}")
    shape = fields.pop("input_shape", None)
    options |= {} if shape is None else {"input_shape": shape}
    model = kind(config, _do_init=False, **options)
    module = model.module

    def apply(variables, inputs, **kwargs):
        output = module.apply(variables, *call(inputs), deterministic=False, rngs=DROPOUT, **kwargs)
        output, *updates = output if kwargs.get("mutable") else (output,)
        logits = output.logits if hasattr(output, "logits") else output[0]
        return (logits, *updates) if updates else logits

    def init():
        options = {"params": jax.random.key(0), **DROPOUT}
        return module.init(options, *call(inputs), deterministic=False)

    variables = filled(jax.eval_shape(init))
    return of_linen(apply, variables, inputs, **fields)


def transformer(config: str, **fields: Any) -> Any:
    """Return a small configuration of `transformers`, most of whose classes agree in names."""
    import transformers

    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 2 * WIDTH,
        "max_position_embeddings": 16,
        "num_labels": CLASSES,
    }
    return getattr(transformers, config)(**{**common, **fields})


def ones(ids):
    return jnp.ones_like(ids)


def positions(ids):
    return jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)


def as_bert(ids):
    return ids, ones(ids), jnp.zeros_like(ids), positions(ids), None


def text(name: str, config: Any, call: Callable[[Any], Any], **fields: Any) -> Case:
    return hugging_face(name, config, tokens(BATCH, LENGTH), call, **fields)


def image(name: str, config: Any, **fields: Any) -> Case:
    size = 16 if "kwargs" in fields else 8
    fields.setdefault("input_shape", (1, size, size, 3))
    return hugging_face(name, config, normal(BATCH, size, size, 3), lambda x: (x,), **fields)


def language_model(name: str, config: Any, call: Callable[[Any], Any], **fields: Any) -> Case:
    labels = labels_like(BATCH, LENGTH, num_classes=VOCABULARY)
    return text(name, config, call, labels=labels, num_classes=VOCABULARY, **fields)


@family("ViT", "Linen", "transformers")
def vit():
    config = transformer("ViTConfig", image_size=8, patch_size=4)
    places = {"middle": "vit/encoder/layer/0", "late": "vit/encoder/layer/1"}
    return image("ViTForImageClassification", config, **places)


@family("BEiT", "Linen", "transformers")
def beit():
    config = transformer("BeitConfig", image_size=8, patch_size=4, drop_path_rate=0.0)
    places = {"middle": "beit/encoder/layer/0", "late": "beit/encoder/layer/1"}
    return hugging_face(
        "BeitForImageClassification",
        config,
        normal(BATCH, 8, 8, 3),
        lambda x: (x, None),
        input_shape=(1, 8, 8, 3),
        **places,
    )


@family("DINOv2", "Linen", "transformers")
def dinov2():
    config = transformer("Dinov2Config", image_size=8, patch_size=4, mlp_ratio=2)
    places = {"middle": "dinov2/encoder/layer/0", "late": "dinov2/encoder/layer/1"}
    return image("Dinov2ForImageClassification", config, **places)


@family("ResNet", "Linen", "transformers")
def hf_resnet():
    import transformers

    config = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 2],
        layer_type="basic",
        num_labels=CLASSES,
    )
    return image(
        "ResNetForImageClassification",
        config,
        kwargs=BATCH_STATS,
        middle="resnet/encoder/stages/0",
        late="resnet/encoder/stages/1/layers/1",
    )


@family("RegNet", "Linen", "transformers")
def hf_regnet():
    import transformers

    config = transformers.RegNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 2],
        groups_width=8,
        layer_type="y",
        num_labels=CLASSES,
    )
    return image(
        "RegNetForImageClassification",
        config,
        kwargs=BATCH_STATS,
        middle="regnet/encoder/stages/0",
        late="regnet/encoder/stages/1/layers/1",
    )


@family("CLIP's vision tower with a head", "Linen", "transformers")
def clip():
    from transformers.models.clip import modeling_flax_clip

    config = transformer("CLIPVisionConfig", image_size=8, patch_size=4, projection_dim=WIDTH)

    class Classifier(nn.Module):
        @nn.compact
        def __call__(self, x):
            output = modeling_flax_clip.FlaxCLIPVisionModule(config, name="clip")(x)
            return nn.Dense(CLASSES, name="head")(output.pooler_output)

    layer = "clip/vision_model/encoder/layers"
    return linen(Classifier(), normal(BATCH, 8, 8, 3), middle=f"{layer}/0", late=f"{layer}/1")


BERT = {"middle": "bert/encoder/layer/0", "late": "bert/encoder/layer/1"}


@family("BERT", "Linen", "transformers")
def bert():
    config = transformer("BertConfig")
    return text("BertForSequenceClassification", config, as_bert, **BERT)


@family("BERT, tokens", "Linen", "transformers")
def bert_tokens():
    labels = labels_like(BATCH, LENGTH)
    config = transformer("BertConfig")
    return text("BertForTokenClassification", config, as_bert, labels=labels, **BERT)


@family("BERT, gradient checkpointing", "Linen", "transformers")
def bert_checkpointed():
    options = {"gradient_checkpointing": True}
    config = transformer("BertConfig")
    return text("BertForSequenceClassification", config, as_bert, **options, **BERT)


@family("RoBERTa", "Linen", "transformers")
def roberta():
    places = {"middle": "roberta/encoder/layer/0", "late": "roberta/encoder/layer/1"}
    config = transformer("RobertaConfig", type_vocab_size=2)
    return text("RobertaForSequenceClassification", config, as_bert, **places)


@family("ELECTRA", "Linen", "transformers")
def electra():
    places = {"middle": "electra/encoder/layer/0", "late": "electra/encoder/layer/1"}
    config = transformer("ElectraConfig", embedding_size=8)
    return text("ElectraForSequenceClassification", config, as_bert, **places)


@family("ALBERT, one layer shared", "Linen", "transformers")
def albert():
    layer = "albert/encoder/albert_layer_groups/0/albert_layers/0"
    return text(
        "AlbertForSequenceClassification",
        transformer("AlbertConfig", embedding_size=8, num_hidden_layers=3),
        lambda ids: as_bert(ids)[:4],
        middle=f"{layer}[0]",
        late=f"{layer}[2]",
    )


@family("DistilBERT", "Linen", "transformers")
def distilbert():
    import transformers

    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=WIDTH,
        n_layers=2,
        n_heads=2,
        hidden_dim=2 * WIDTH,
        max_position_embeddings=16,
        num_labels=CLASSES,
    )
    layer = "distilbert/transformer/layer"
    return text(
        "DistilBertForSequenceClassification",
        config,
        lambda ids: (ids, ones(ids)),
        middle=f"{layer}/0",
        late=f"{layer}/1",
    )


@family("RoFormer", "Linen", "transformers")
def roformer():
    return text(
        "RoFormerForSequenceClassification",
        transformer("RoFormerConfig", embedding_size=WIDTH),
        lambda ids: (ids, ones(ids), jnp.zeros_like(ids), None),
        middle="roformer/encoder/layer/0",
        late="roformer/encoder/layer/1",
    )


def causal(ids):
    return ids, ones(ids), positions(ids)


@family("GPT-2", "Linen", "transformers")
def gpt2():
    import transformers

    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=WIDTH, n_layer=2, n_head=2
    )
    places = {"middle": "transformer/h/0", "late": "transformer/h/1"}
    return language_model("GPT2LMHeadModel", config, causal, **places)


@family("GPT-Neo", "Linen", "transformers")
def gpt_neo():
    import transformers

    config = transformers.GPTNeoConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=16,
        hidden_size=WIDTH,
        num_layers=2,
        num_heads=2,
        intermediate_size=2 * WIDTH,
        attention_types=[[["global", "local"], 1]],
    )
    places = {"middle": "transformer/h/0", "late": "transformer/h/1"}
    return language_model("GPTNeoForCausalLM", config, causal, **places)


@family("OPT", "Linen", "transformers")
def opt():
    places = {"middle": "model/decoder/layers/0", "late": "model/decoder/layers/1"}
    config = transformer("OPTConfig", ffn_dim=2 * WIDTH, word_embed_proj_dim=WIDTH)
    return language_model("OPTForCausalLM", config, causal, **places)


@family("Llama", "Linen", "transformers")
def llama():
    places = {"middle": "model/layers/0", "late": "model/layers/1"}
    return language_model("LlamaForCausalLM", transformer("LlamaConfig"), causal, **places)


@family("Bloom", "Linen", "transformers")
def bloom():
    import transformers

    config = transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=2, n_head=2)
    places = {"middle": "transformer/h/0", "late": "transformer/h/1"}
    return language_model("BloomForCausalLM", config, lambda ids: (ids, ones(ids)), **places)


@family("BART, encoder and decoder", "Linen", "transformers")
def bart():
    import transformers

    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=2 * WIDTH,
        decoder_ffn_dim=2 * WIDTH,
        max_position_embeddings=16,
    )

    def call(ids):
        return ids, ones(ids), ids, ones(ids), positions(ids), positions(ids)

    places = {"middle": "model/encoder/layers/0", "late": "model/decoder/layers/1"}
    return language_model("BartForConditionalGeneration", config, call, **places)


@family("Wav2Vec 2.0, frames", "Linen", "transformers")
def wav2vec2():
    config = transformer(
        "Wav2Vec2Config",
        conv_dim=(8, 8),
        conv_kernel=(4, 4),
        conv_stride=(4, 4),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        do_stable_layer_norm=True,
        feat_extract_norm="layer",
        mask_time_prob=0.0,
    )
    places = {
        "middle": "wav2vec2/encoder/layers/0",
        "late": "wav2vec2/encoder/layers/1",
    }
    return hugging_face(
        "Wav2Vec2ForCTC",
        config,
        normal(BATCH, 80),
        lambda x: (x, jnp.ones(x.shape, jnp.int32), None),
        labels=labels_like(BATCH, 5, num_classes=VOCABULARY),
        num_classes=VOCABULARY,
        input_shape=(1, 80),
        **places,
    )


# ---------------------------------------------------------------- others


@family("ResNet-D", "Linen", "jax-resnet")
def jax_resnet():
    import jax_resnet

    model = jax_resnet.ResNet(
        block_cls=jax_resnet.ResNetDBlock,
        stem_cls=jax_resnet.resnet.ResNetDStem,
        stage_sizes=[1, 1, 1],
        hidden_sizes=(8, 16, 16),
        n_classes=CLASSES,
    )
    places = {"middle": "layers_2", "late": "layers_4"}
    return linen(model, normal(BATCH, 16, 16, 3), kwargs=BATCH_STATS, **places)


@family("ResNet-18", "Linen", "flaxmodels")
def flaxmodels_resnet():
    import flaxmodels

    model = flaxmodels.ResNet18(
        output="logits", pretrained=None, normalize=False, num_classes=CLASSES
    )
    return linen(
        model,
        normal(BATCH, 64, 64, 3),
        {"train": False},
        kwargs={"train": True, **BATCH_STATS},
        middle="BasicBlock_3",
        late="BasicBlock_7",
    )


@family("Linear recurrent unit (LRU)", "Linen", "long-range-models")
def lru():
    import long_range_models

    inner = long_range_models.LRULayer(feature_dim=WIDTH, state_dim=8)
    model = long_range_models.SequenceModel(inner, VOCABULARY, WIDTH, CLASSES, pool=True)
    return linen(model, tokens(BATCH, LENGTH), middle="Embed_0", late="module")


@family("Mamba-2 language model", "NNX", "mamba2-jax")
def mamba2():
    import mamba2_jax

    config = mamba2_jax.Mamba2Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        state_size=8,
        head_dim=8,
        num_hidden_layers=2,
        chunk_size=4,
    )
    model = mamba2_jax.Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))
    return of_nnx(
        model,
        tokens(BATCH, LENGTH),
        logits=lambda output: output["logits"],
        labels=labels_like(BATCH, LENGTH, num_classes=VOCABULARY),
        num_classes=VOCABULARY,
        middle="backbone/layers/0:0",
        late="backbone/layers/1:0",
    )
