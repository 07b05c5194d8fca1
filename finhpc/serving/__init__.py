"""A model behind OpenAI's API: requests and answers, adapters by name, metrics, the app, its place in Ray Serve."""
