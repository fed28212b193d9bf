//! Watching a tunnel that has started: whether its process lives, speaks and answers.

use std::{sync::Arc, time::Duration};

use tokio::time::MissedTickBehavior;

use super::{
    death::{Death, LAST_WORDS, Reason},
    running::Running,
};
use crate::{link::LinkClient, process::LogRing};

/// How often the tunnel is asked whether it lives.
const INTERVAL: Duration = Duration::from_secs(5);
/// How long it may take to answer: its tasks get their turn within milliseconds.
const LIMIT: Duration = Duration::from_secs(2);
/// A tunnel that was missed so often in a row hangs.
const MISSES: u32 = 2;
/// How long a process whose connection ended may take to be seen ending: it is about to.
const EXIT_LIMIT: Duration = Duration::from_millis(100);
/// How long its last words may take to be read. With the above, clients hear of a death within 250 ms.
const WORDS_LIMIT: Duration = Duration::from_millis(50);

/// Waits until the tunnel is of no more use, and says why. Whoever drops it then kills what is left of it.
pub(super) async fn watch(running: Arc<Running>, log: LogRing) -> Death {
    let process = running.process();
    let death = tokio::select! {
        biased;
        exit = process.exited() => Death::from(exit),
        () = running.silent() => match process.exited_within(EXIT_LIMIT).await {
            Some(exit) => Death::from(exit),
            None => Death::new(Reason::Lost, "the tunnel process closed its connection to the service"),
        },
        () = hangs(running.link()) => Death::new(
            Reason::Hung,
            format!("the tunnel process did not answer {MISSES} times in a row"),
        ),
    };
    if process.exit().is_some() {
        running.silent_soon().await;
        process.heard_out(WORDS_LIMIT).await;
    }
    let words = log.last(LAST_WORDS).join(" | ");
    tracing::warn!(pid = process.pid(), reason = %death.text, last_words = %words, "the tunnel died");
    death
}

/// Ends when the tunnel does not answer. Without a private link nobody can tell.
async fn hangs(link: Option<&LinkClient>) {
    let Some(link) = link else { return std::future::pending().await };
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut misses = 0;
    while misses < MISSES {
        ticks.tick().await;
        misses = match link.liveness(LIMIT).await {
            Ok(()) => 0,
            Err(error) => {
                tracing::warn!(%error, "the tunnel process does not answer");
                misses + 1
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use tokio::{net::UnixStream, time::Instant};
    use warren_proto::{
        frame::{self, Decoder},
        link::{Frame, Hello, Pong, frame::Body},
    };

    use super::*;
    use crate::link::{MAX_FRAME, VERSION};

    /// A tunnel's end of the link that answers the first `answers` questions.
    async fn answer(stream: UnixStream, mut answers: u32) {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let (mut read, mut write) = stream.into_split();
        let hello =
            Frame { id: 0, body: Some(Body::Hello(Hello { version: VERSION, program: String::new() })) };
        write.write_all(&frame::encode_within(&hello, MAX_FRAME).unwrap()).await.unwrap();
        let mut decoder = Decoder::new(MAX_FRAME);
        let mut bytes = [0; 1024];
        while let Ok(length @ 1..) = read.read(&mut bytes).await {
            decoder.extend(&bytes[..length]);
            while let Some(question) = decoder.next::<Frame>().unwrap() {
                if matches!(question.body, Some(Body::Ping(_))) && answers > 0 {
                    answers -= 1;
                    let pong = Frame { id: question.id, body: Some(Body::Pong(Pong {})) };
                    write.write_all(&frame::encode_within(&pong, MAX_FRAME).unwrap()).await.unwrap();
                }
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_tunnel_that_is_missed_twice_in_a_row_hangs() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        tokio::spawn(answer(theirs, 3));
        let link = LinkClient::connect(ours).await.unwrap();
        let begun = Instant::now();

        hangs(Some(&link)).await;

        let taken = begun.elapsed();
        let expected = 4 * INTERVAL + LIMIT;
        assert!((expected..expected + INTERVAL).contains(&taken), "{taken:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn another_program_cannot_be_asked_and_is_left_alone() {
        assert!(tokio::time::timeout(100 * INTERVAL, hangs(None)).await.is_err());
    }
}
