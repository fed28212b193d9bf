//! What logind says of sleep, over the system's bus: that it is over (`PrepareForSleep`, vpn-protocol 13.2).
//!
//! The kernel's clocks tell that, too ([`warren_actors::resume`]), and on machines without logind they alone do.

use std::time::Duration;

use futures::StreamExt;
use tokio::time::{sleep, timeout};
use warren_core::backoff::Backoff;
use zbus::{MatchRule, MessageStream, connection::Builder, message::Type};

/// For one step of getting to hear logind.
const STEP_LIMIT: Duration = Duration::from_secs(10);
/// Between attempts: a bus that was started anew is there soon, and where there is none it costs nothing to look.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(300));
const JITTER: f64 = 0.2;

/// Tells of every sleep that is over, for ever.
pub(super) async fn watch<F: Future<Output = ()>>(tell: impl Fn() -> F) {
    let (floor, cap) = PAUSES;
    let mut backoff = Backoff::new(floor, cap, 2.0, JITTER);
    loop {
        let error = match subscribe(Builder::system()).await {
            Ok(signals) => {
                backoff.reset();
                tracing::debug!("what logind says of sleep is heard");
                hear(signals, &tell).await;
                "the bus has ended".to_owned()
            }
            Err(error) => error.to_string(),
        };
        let pause = backoff.next(super::random());
        tracing::debug!(
            error,
            ?pause,
            "logind is not heard; that the machine has slept is told by its clocks"
        );
        sleep(pause).await;
    }
}

/// Asks a bus for what logind says of sleep, and for nothing else.
async fn subscribe(bus: Builder<'_>) -> zbus::Result<MessageStream> {
    let sleeps = MatchRule::builder()
        .msg_type(Type::Signal)
        .sender("org.freedesktop.login1")
        .path("/org/freedesktop/login1")
        .interface("org.freedesktop.login1.Manager")
        .member("PrepareForSleep")
        .build()?;
    let timed_out = |_| zbus::Error::from(std::io::Error::from(std::io::ErrorKind::TimedOut));
    let bus = timeout(STEP_LIMIT, bus.build()).await.map_err(timed_out)??;
    timeout(STEP_LIMIT, MessageStream::for_match_rule(sleeps, &bus, None)).await.map_err(timed_out)?
}

/// Tells of sleeps that are over until the bus ends.
///
/// Anybody on the bus can send such a signal. Of what is said to all the bus passes on to us what logind says; what is
/// said to us alone it passes on whoever says it, and logind never does.
async fn hear<F: Future<Output = ()>>(mut signals: MessageStream, tell: impl Fn() -> F) {
    while let Some(Ok(signal)) = signals.next().await {
        if signal.header().destination().is_some() {
            tracing::debug!("somebody who is not logind speaks of sleep");
            continue;
        }
        // True as it begins.
        match signal.body().deserialize::<bool>() {
            Ok(true) => {}
            Ok(false) => tell().await,
            Err(error) => tracing::debug!(%error, "logind says something else of sleep"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use serde::Serialize;
    use tokio::sync::mpsc;
    use zbus::{
        Connection, Guid,
        message::{self, Message},
        zvariant::DynamicType,
    };

    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn the_end_of_a_sleep_is_told_and_its_beginning_and_what_makes_no_sense_is_not() {
        let (signals, logind) = heard().await;
        let (tell, mut told) = mpsc::channel(8);
        let hearing = tokio::spawn(async move { hear(signals, async || tell.send(()).await.unwrap()).await });
        logind.say(&true).await;
        logind.say(&"soon").await;
        logind.say(&false).await;
        logind.say(&true).await;
        logind.say(&false).await;
        // To us alone.
        logind.send(signal().destination(":1.7"), &false).await;
        drop(logind);
        timeout(LIMIT, hearing).await.expect("it ends with the bus").unwrap();
        let mut times = 0;
        while told.recv().await.is_some() {
            times += 1;
        }
        assert_eq!(times, 2);
    }

    #[tokio::test]
    async fn only_what_logind_itself_says_is_asked_for() {
        let (_signals, logind) = heard().await;
        assert_eq!(
            logind.rule,
            "type='signal',sender='org.freedesktop.login1',interface='org.freedesktop.login1.Manager',\
             member='PrepareForSleep',path='/org/freedesktop/login1'"
        );
    }

    #[tokio::test]
    async fn a_bus_that_refuses_or_is_not_there_is_an_error() {
        assert!(subscribe(Builder::address("unix:path=/nonexistent/bus")).await.is_err());
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert!(subscribe(Builder::unix_stream(ours)).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_bus_that_says_nothing_is_not_waited_for_for_ever() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let begun = tokio::time::Instant::now();
        assert!(subscribe(Builder::unix_stream(ours)).await.is_err());
        assert_eq!(begun.elapsed(), STEP_LIMIT);
    }

    /// A bus with nobody on it but us and logind, and what logind says heard.
    struct Logind {
        connection: Connection,
        rule: String,
    }

    async fn heard() -> (MessageStream, Logind) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let bus = async {
            let connection =
                Builder::unix_stream(theirs).server(Guid::generate()).p2p().build().await.unwrap();
            let mut asked = MessageStream::from(&connection);
            let mut rule = String::new();
            while let Some(Ok(call)) = asked.next().await {
                let header = call.header();
                let answer = Message::method_return(&header);
                match header.member().unwrap().as_str() {
                    "Hello" => connection.send(&answer.build(&":1.7").unwrap()).await.unwrap(),
                    "AddMatch" => {
                        rule = call.body().deserialize::<&str>().unwrap().to_owned();
                        connection.send(&answer.build(&()).unwrap()).await.unwrap();
                        break;
                    }
                    other => panic!("{other}"),
                }
            }
            Logind { connection, rule }
        };
        let (signals, logind) = tokio::join!(subscribe(Builder::unix_stream(ours)), bus);
        (signals.unwrap(), logind)
    }

    impl Logind {
        async fn say(&self, body: &(impl Serialize + DynamicType)) {
            self.send(signal(), body).await;
        }

        async fn send(&self, signal: message::Builder<'_>, body: &(impl Serialize + DynamicType)) {
            self.connection.send(&signal.build(body).unwrap()).await.unwrap();
        }
    }

    fn signal() -> message::Builder<'static> {
        let (path, interface) = ("/org/freedesktop/login1", "org.freedesktop.login1.Manager");
        Message::signal(path, interface, "PrepareForSleep").sender(":1.2")
    }
}
