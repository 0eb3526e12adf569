"""Where the documentation of the estimators is."""

__all__ = ["DocumentationLinkMixin"]


class DocumentationLinkMixin:
    """Links an estimator's HTML representation to the API reference; scikit-learn shows tooltips only with a link."""

    _doc_link_module = "skdim"
    _doc_link_template = "https://scikit-deepinfomax.readthedocs.io/en/stable/api.html"
