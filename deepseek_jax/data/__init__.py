"""Everything between text and the arrays that a train step takes.

The walk of a pretraining document: `text.read_documents` -> `tokens.tokenize`, once for all runs; then for a run
`fim.apply_fim` -> `packing.pack_stream` -> `rows.write_rows`, once; then `rows.RowLoader` gives its batches.
The walk of a chat: `text.read_chats` -> `conversations` (one form of many) -> `chat.encode_chat` (by the model's own
template: `by_template`) -> `packing.pack_samples` -> the same rows.

A batch is a dict of arrays (B S):

* `tokens` int32;
* `segment_ids` int32: 0 is padding, 1, 2, ... the documents packed into the row;
* `positions` int32: restart at 0 in each segment, 0 in the padding;
* `loss_mask` float32: 1 where the token at this index counts when it is the prediction target.

Nothing in here knows of losses, models or devices.
"""
