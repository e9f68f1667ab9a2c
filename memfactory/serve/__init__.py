"""A trained agent in use: behind OpenAI's protocol, or in a terminal."""
