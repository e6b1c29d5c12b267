"""What a setting is, all settings, the named sets of them, and how they are overridden, read and written."""
