"""Chat: messages to a prompt (`render`), and the model's output back to reasoning and tool calls."""
