"""The command that writes the dashboards."""

from pathlib import Path

from deploy.grafana.make_dashboards import dashboards

FOLDER = Path(__file__).parent.parent / "dashboards"


def main() -> None:
    """Write every file."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in dashboards().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
