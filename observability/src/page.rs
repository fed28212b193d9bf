//! The plain page at `/`: what an operator sees who opens the metrics address in a browser. It shows
//! no names, addresses or keys: the listener needs no authentication on loopback.

use std::fmt::Write;

/// What the page shows.
#[derive(Debug, Clone, Default)]
pub struct Page {
    /// The program's version.
    pub version: &'static str,
    /// Rows of the summary: what, and its present value.
    pub rows: Vec<(&'static str, String)>,
    /// What is wrong, in words.
    pub problems: Vec<String>,
}

/// Renders the page as a complete HTML document that needs nothing else.
pub fn render(page: &Page) -> String {
    let mut rows = String::new();
    for (what, value) in &page.rows {
        let _ = writeln!(rows, "<tr><th scope=\"row\">{}</th><td>{}</td></tr>", escape(what), escape(value));
    }
    let mut problems = String::new();
    for problem in &page.problems {
        let _ = writeln!(problems, "<li>{}</li>", escape(problem));
    }
    let problems = if problems.is_empty() {
        "<p class=\"good\">Everything works.</p>".to_owned()
    } else {
        format!("<ul class=\"bad\">{problems}</ul>")
    };
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>warren</title>\
         <meta http-equiv=\"refresh\" content=\"5\"><meta name=\"viewport\" content=\"width=device-width\">\
         <style>{STYLE}</style></head>\n<body><main><h1>warren <small>{version}</small></h1>\n{problems}\n\
         <table>\n{rows}</table>\n<p><a href=\"/metrics\">metrics</a> <a href=\"/healthz\">health</a> \
         <a href=\"/readyz\">readiness</a></p></main></body></html>\n",
        version = escape(page.version),
    )
}

const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;margin:0;color:#1b1f24;background:#f6f7f9}\
main{max-width:44rem;margin:3rem auto;padding:0 1.5rem}h1{font-size:1.6rem}small{font-weight:400;color:#69727d}\
table{border-collapse:collapse;width:100%;background:#fff;border:1px solid #dfe3e8}\
th,td{text-align:left;padding:.5rem .9rem;border-bottom:1px solid #eceff2;font-weight:400}\
th{color:#69727d;width:16rem}.good{color:#116329}.bad{color:#a40e26}a{margin-right:1rem;color:#0b5cad}\
@media(prefers-color-scheme:dark){body{color:#e6e8ea;background:#14171a}table{background:#1b1f24;border-color:#30363d}\
th,td{border-color:#262c33}.good{color:#57c26b}.bad{color:#ff8a8a}a{color:#7ab8ff}}";

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_from_elsewhere_cannot_become_markup() {
        let page = Page { problems: vec!["<script>alert(1)</script>".into()], ..Page::default() };
        let html = render(&page);
        assert!(html.contains("&lt;script&gt;") && !html.contains("<script>"));
    }

    #[test]
    fn a_page_without_problems_says_so() {
        assert!(render(&Page::default()).contains("Everything works."));
    }
}
