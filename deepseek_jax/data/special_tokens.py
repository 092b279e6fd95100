"""DeepSeek's special tokens, and its format of a chat, in them, as a template."""

# The bar is U+FF5C and the underscore U+2581, as in DeepSeek's released tokenizers.
BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
THINK = "<think>"
END_THINK = "</think>"
FIM_HOLE = "<｜fim▁hole｜>"
FIM_BEGIN = "<｜fim▁begin｜>"
FIM_END = "<｜fim▁end｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
EOT = "<|EOT|>"
TOOL_TOKENS = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<｜tool▁sep｜>",
)
# In the order of R1's ids: the first three open the vocabulary, the others close it.
SPECIAL_TOKENS = (BOS, EOS, PAD)
SPECIAL_TOKENS += (THINK, END_THINK, FIM_HOLE, FIM_BEGIN, FIM_END, USER, ASSISTANT, EOT, *TOOL_TOKENS)
PAD_ID = 2

# DeepSeek's format as a chat template, for who reads a model that was trained here: it writes what data/chat.py writes
# as ids, but that special tokens count wherever they stand. System messages open the conversation, and all
# assistants' turns but one that ends it lose their thinking.
DEEPSEEK_TEMPLATE = f"""\
{{{{ bos_token }}}}
{{{{- messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\\n\\n') }}}}
{{%- for message in messages %}}
    {{%- if message.role == 'user' %}}
        {{{{- '{USER}' + message.content }}}}
    {{%- elif message.role == 'assistant' %}}
        {{{{- '{ASSISTANT}' + (message.content if loop.last else message.content.split('{END_THINK}')[-1]) }}}}
        {{{{- eos_token }}}}
    {{%- endif %}}
{{%- endfor %}}
{{%- if add_generation_prompt %}}{{{{- '{ASSISTANT}' }}}}{{% endif %}}"""
