"""The HTTP server: OpenAI's endpoints over the engine, with DeepSeek's thinking and tool calls, and a page to talk in."""
