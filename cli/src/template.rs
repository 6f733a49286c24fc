//! A model's own chat template (Jinja), rendered as llama-server does it: same variables, same white space rules, and BOS
//! taken off where the tokeniser puts one.

use anyhow::{anyhow, ensure, Context as _, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::{context, Environment, Error, ErrorKind, Value};

/// A parsed template with the special tokens of its model.
pub struct Template {
    environment: Environment<'static>,
    bos: String,
    eos: String,
    /// The tokeniser begins every prompt with BOS.
    add_bos: bool,
}

const NAME: &str = "chat";

impl Template {
    /// `bos` and `eos` are the special tokens as text, empty where the model has none.
    ///
    /// # Errors
    /// The template cannot be parsed, or it writes the date: then no prompt stays the same.
    pub fn new(source: &str, bos: &str, eos: &str, add_bos: bool) -> Result<Template> {
        let dated = ["strftime_now", "date_string", "datetime"].iter().any(|name| source.contains(name));
        ensure!(!dated, "it writes the date, so a prompt changes from day to day");
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(one_line)?;
        environment.set_syntax(syntax);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |text: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, text))
        });
        environment.add_template_owned(NAME, source.to_string()).map_err(one_line)?;
        Ok(Template { environment, bos: bos.into(), eos: eos.into(), add_bos })
    }

    /// The prompt of these messages (role and content), with the start of the answer.
    ///
    /// # Errors
    /// The template does not take them.
    pub fn render(&self, messages: &[(&str, &str)]) -> Result<String> {
        let messages: Vec<Value> = messages.iter().map(|&(role, content)| context! { role, content }).collect();
        let template = self.environment.get_template(NAME).context("the template was added")?;
        let text = template
            .render(context! {
                messages,
                bos_token => self.bos.clone(),
                eos_token => self.eos.clone(),
                enable_thinking => true,
                add_generation_prompt => true,
            })
            .map_err(one_line)?;
        match text.strip_prefix(&self.bos) {
            Some(rest) if self.add_bos => Ok(rest.to_string()),
            _ => Ok(text),
        }
    }
}

fn one_line(error: Error) -> anyhow::Error {
    let line = error.line().map_or(String::new(), |n| format!(" (line {n})"));
    anyhow!("{}{line}", error.detail().map_or_else(|| error.kind().to_string(), str::to_string))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHAT: [(&str, &str); 2] = [("system", "Be {{ brief }}.\n"), ("user", " Why?")];

    #[test]
    fn bos_is_the_tokenisers_business_where_it_adds_one() {
        let source = "{{ bos_token }}{% for m in messages %}\n<{{ m.role }}>{{ m['content'] | trim }}\n{% endfor %}\n\
                      {% if add_generation_prompt %}\n<answer>{% endif %}";
        let given = |add_bos| Template::new(source, "<s>", "</s>", add_bos).unwrap().render(&CHAT).unwrap();
        assert_eq!(given(false), "<s><system>Be {{ brief }}.\n<user>Why?\n<answer>");
        assert_eq!(given(true), "<system>Be {{ brief }}.\n<user>Why?\n<answer>");
    }

    #[test]
    fn methods_of_python_and_namespaces_are_known() {
        let source = "{%- set ns = namespace(n=0) -%}{%- for m in messages -%}{%- set ns.n = ns.n + 1 -%}\
                      {{- m.role.upper() + ':' + m.content.strip().split('?')[0] + '|' -}}{%- endfor -%}{{- ns.n -}}";
        let text = Template::new(source, "", "", true).unwrap().render(&CHAT).unwrap();
        assert_eq!(text, "SYSTEM:Be {{ brief }}.|USER:Why|2");
    }

    #[test]
    fn what_cannot_be_rendered_says_why() {
        let raises = Template::new("{{ raise_exception('No system role') }}", "", "", false).unwrap();
        assert!(format!("{:#}", raises.render(&CHAT).unwrap_err()).contains("No system role"));
        assert!(Template::new("{% if %}", "", "", false).is_err());
        for source in ["{{ strftime_now('%d') }}", "{{ date_string }}"] {
            let dated = Template::new(source, "", "", false).err().unwrap();
            assert!(format!("{dated:#}").contains("date"), "{dated:#}");
        }
    }
}
