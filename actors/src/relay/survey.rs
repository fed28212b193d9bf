//! Looks at how the world sees us and how far the relays are: carries out what [`warren_core::netcheck`] decides.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Instant, SystemTime},
};

use tokio::task::JoinHandle;
use warren_core::{
    netcheck::{
        Effect, Family, Mappings, Netcheck, Report, RunId, StunHost, StunTarget, Trigger, Unsent, Usage,
    },
    relay_map::RelayMap,
};
use warren_proto::stun::TxId;

use super::{
    Message,
    latency::{self, Probe},
};
use crate::{
    data_plane::{DataPlane, StunAnswer, StunUnsent},
    facts::{Net, Seen},
    runtime::{Alarm, CellWriter, Context},
    udp::LocalPorts,
};

/// The shell of netcheck; the relay's alone.
pub(super) struct Survey {
    core: Netcheck,
    /// Whose latencies are being measured.
    run: RunId,
    /// Where our sockets were bound when the present look began.
    ports: (RunId, Option<LocalPorts>),
    measuring: Option<JoinHandle<Option<()>>>,
    alarm: Alarm,
    seen: CellWriter<Seen>,
    /// Bytes through the tunnel as last looked at, and when they grew.
    traffic: (u64, Option<Instant>),
}

impl Survey {
    pub(super) fn new(seen: CellWriter<Seen>) -> Self {
        let (core, run, alarm) = (Netcheck::new(), RunId::default(), Alarm::default());
        Self { core, run, ports: (run, None), measuring: None, alarm, seen, traffic: (0, None) }
    }

    /// Which measurement is the present one.
    pub(super) fn run(&self) -> RunId {
        self.run
    }

    pub(super) fn set_map(&mut self, map: &Arc<RelayMap>) {
        self.core.set_map(Instant::now(), Arc::clone(map));
    }

    pub(super) fn trigger(&mut self, trigger: Trigger) {
        self.core.handle_trigger(Instant::now(), trigger);
    }

    /// Takes what belongs to the circumstances: they are looked at often.
    pub(super) fn follow(&mut self, net: &Net) {
        let now = Instant::now();
        let stats = net.data_plane.stats();
        let bytes = stats.values().map(|peer| peer.received_bytes + peer.sent_bytes).sum();
        if bytes != self.traffic.0 {
            self.traffic = (bytes, Some(now));
        }
        self.core.set_usage(now, Usage { peers: stats.len(), last_packet: self.traffic.1 });
        self.core.set_families(now, *net.families.get());
        self.core.set_home(*net.home.get());
    }

    pub(super) fn take_stun(&mut self, answer: &StunAnswer) {
        self.core.handle_stun_answer(answer.from, &answer.txid, answer.address);
    }

    pub(super) fn take_unsent(&mut self, txid: &TxId, why: Unsent) {
        self.core.handle_unsent(txid, why);
    }

    pub(super) fn take_latencies(&mut self, run: RunId, report: &warren_core::home::Report) {
        for (region, latency) in report {
            self.core.handle_latency(run, *region, *latency);
        }
        self.core.handle_measured(run);
    }

    /// Does what is due; returns the reports of runs that have ended. `probes` says what to measure.
    pub(super) fn drive(
        &mut self,
        context: &Context<Message>,
        net: &Net,
        probes: impl Fn() -> Vec<Probe>,
    ) -> Vec<Report> {
        let mut reports = Vec::new();
        let ports = net.data_plane.local_ports();
        self.core.handle_timeout(Instant::now(), |bytes| {
            bytes.iter_mut().for_each(|byte| *byte = rand::random());
        });
        while let Some(effect) = self.core.poll_effect() {
            match effect {
                Effect::SendStun { to, txid } => ask(context, &net.data_plane, to, txid),
                Effect::MeasureLatencies { run } => self.measure(context, net, run, probes()),
                Effect::Mapped(mappings) => {
                    let report = self.seen.get().report.clone();
                    self.publish(mappings, report);
                }
                Effect::Finished(report) => {
                    let (mappings, told) = (report.mappings, Some((SystemTime::now(), report.clone())));
                    self.publish(mappings, told);
                    reports.push(report);
                }
            }
        }
        // What was told just now was found out by the one before.
        if self.ports.0 != self.core.latest_run() {
            self.ports = (self.core.latest_run(), ports);
        }
        self.alarm.set(context, self.core.poll_timeout(), Message::SurveyDue);
        reports
    }

    fn publish(&self, mappings: Mappings, report: Option<(SystemTime, Report)>) {
        let looks = self.seen.get().looks + 1;
        self.seen.set(Seen { looks, mappings, ports: self.ports.1, report });
    }

    fn measure(&mut self, context: &Context<Message>, net: &Net, run: RunId, probes: Vec<Probe>) {
        self.run = run;
        let (me, dialer) = (context.me.clone(), Arc::clone(net.data_plane.dialer()));
        let measuring = context.tasks.spawn(async move {
            let hand_over = |stage, report| {
                let me = me.clone();
                // A part that is down measures anew when it is back.
                async move { me.send(Message::Measured { run, stage, report }).await.unwrap_or_default() }
            };
            latency::measure(&dialer, probes, hand_over).await;
        });
        if let Some(predecessor) = self.measuring.replace(measuring) {
            predecessor.abort();
        }
    }
}

/// Asks a STUN server; its name is resolved beside, since that may take its time.
fn ask(context: &Context<Message>, data_plane: &DataPlane, to: StunTarget, txid: TxId) {
    let (me, data_plane) = (context.me.clone(), data_plane.clone());
    let _asking = context.tasks.spawn(async move {
        let unsent = match address(&to).await {
            None => Unsent::NoAddress,
            Some(address) => match data_plane.send_stun(address, txid) {
                Ok(()) => return,
                Err(StunUnsent::NoSocket) => Unsent::NoAddress,
                Err(_) => Unsent::Refused,
            },
        };
        // A run that hears nothing ends all the same.
        let _ = me.send(Message::StunUnsent { txid, why: unsent }).await;
    });
}

async fn address(target: &StunTarget) -> Option<SocketAddr> {
    let is_wanted = |address: &SocketAddr| Family::of(address.ip()) == target.family;
    match &target.host {
        StunHost::Address(address) => Some(SocketAddr::new(*address, target.port)),
        StunHost::Name(name) => {
            let found = tokio::net::lookup_host((name.as_str(), target.port));
            let found = tokio::time::timeout(warren_core::netcheck::RUN_LIMIT, found).await.ok()?;
            found.ok()?.find(is_wanted)
        }
    }
}
