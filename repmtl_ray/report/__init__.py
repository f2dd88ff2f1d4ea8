"""From rows to what people read: tables, figures, files. Imports no Ray."""
