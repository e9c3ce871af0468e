"""What a checkpoint's files hold, before any weight is read. `header` reads one
safetensors header, `index` joins those of all files; `dtypes` names their types."""
