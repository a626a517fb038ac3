"""The bundled trained suite: corpus, tasks, assets and the script that trained it."""
