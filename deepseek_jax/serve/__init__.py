"""Answers over HTTP: two processes, so that thousands of events a second do not share an interpreter with the engine.

The **engine process** (``engine_process``) is the one that was started: it owns jax and the weights. Its child
(``http_process``) has uvicorn, the tokenizer and templates, and never imports jax. They talk over a pair of sockets in
msgpack (``link``); where either ends, so does the other.

The walk of a chat request: ``guard`` (may it come in?) → ``app`` → ``schema`` (is it one?) → ``asked`` (ids, sampling)
→ ``asking`` (the engine, or in tests a fake) → ``answering`` (text, up to a stop string) → ``written`` (OpenAI's
objects) → SSE or JSON.
"""
