"""``smoothkd report``: a sweep's report in files."""

from pathlib import Path

from services.contract.errors import InvalidInputError
from services.reports.folder import make_folder

FORMATS = ("md", "csv", "tex", "html", "json")


def write_report(sweep_id: str, *, out: Path, formats: str) -> list[Path]:
    """Fetches the report once per format from the API; returns the files, which appear only when whole."""
    from services.cli import sweep_views

    wanted = list(dict.fromkeys(part.strip() for part in formats.split(",") if part.strip()))
    unknown = [form for form in wanted if form not in FORMATS]
    if unknown or not wanted:
        raise InvalidInputError(
            f"there is no report as {', '.join(unknown) or 'nothing'}", fix=f"Choose from {', '.join(FORMATS)}."
        )
    make_folder(out)
    with sweep_views.client() as api:
        texts = {form: api.report(sweep_id, form=form) for form in wanted}
    files = []
    for form, text in texts.items():
        file = out / f"report.{form}"
        partial = file.with_name(f".{file.name}.partial")
        # A CSV's own line ends stay as they are.
        partial.write_bytes(text.encode())
        partial.replace(file)
        files.append(file)
    return files
