"""DeepSeekMoE-16B for transformers, which has its layers (the text model of DeepSeek-OCR-2) and not the model: here
they get a head, the released class's name, and a configuration that reads the released config.json.

Files, experts and generation stay transformers' own code. Import it where torch and transformers are known to be there.
"""

import importlib
from typing import Any

torch = importlib.import_module("torch")
transformers = importlib.import_module("transformers")
conversion = importlib.import_module("transformers.conversion_mapping")
outputs = importlib.import_module("transformers.modeling_outputs")
ocr = importlib.import_module("transformers.models.deepseek_ocr2.modeling_deepseek_ocr2")

# Experts one by one in files and stacked in memory, as of V2 and V3. For OCR-2 transformers knows this only together
# with the names that the text model has inside it.
conversion.register_checkpoint_conversion_mapping(
    "DeepseekOcr2TextModel", conversion.get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True
)


class DeepseekConfig(ocr.DeepseekOcr2TextConfig):
    model_type = "deepseek"

    def __post_init__(self, **kwargs: Any):
        dense = kwargs["first_k_dense_replace"]
        self.mlp_layer_types = ["dense" if i < dense else "sparse" for i in range(self.num_hidden_layers)]
        super().__post_init__(**kwargs)


class DeepseekForCausalLM(ocr.DeepseekOcr2TextPreTrainedModel, transformers.GenerationMixin):
    config_class = DeepseekConfig

    def __init__(self, config: DeepseekConfig):
        super().__init__(config)
        self.model = ocr.DeepseekOcr2TextModel(config)
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        out = self.model(input_ids, **kwargs)
        logits = self.lm_head(out.last_hidden_state)
        return outputs.CausalLMOutputWithPast(logits=logits, past_key_values=out.past_key_values)
