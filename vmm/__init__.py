"""The machine: configuration, memory, coordinator, dirty log and its consumers, control API, CLI."""
