package main

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"

	"tailscale.com/disco"
	"tailscale.com/net/stun"
)

// A valve makes sockets that lose everything in a direction while that is shut, as a firewall that drops would. It
// says what comes first from an address, and counts.
type valve struct {
	isDeaf, isDumb   atomic.Bool
	disco, wireguard atomic.Uint64

	mutex sync.Mutex
	heard map[netip.AddrPort]bool
}

func (v *valve) ListenPacket(ctx context.Context, network, address string) (net.PacketConn, error) {
	socket, err := new(net.ListenConfig).ListenPacket(ctx, network, address)
	if err != nil {
		return nil, err
	}
	return &valvedSocket{socket.(*net.UDPConn), v}, nil
}

type valvedSocket struct {
	*net.UDPConn
	valve *valve
}

func (s *valvedSocket) ReadFromUDPAddrPort(buffer []byte) (int, netip.AddrPort, error) {
	for {
		length, from, err := s.UDPConn.ReadFromUDPAddrPort(buffer)
		if err != nil {
			return length, from, err
		}
		if !s.valve.isDeaf.Load() {
			s.valve.note(buffer[:length], from)
			return length, from, nil
		}
	}
}

func (s *valvedSocket) WriteToUDPAddrPort(packet []byte, to netip.AddrPort) (int, error) {
	if s.valve.isDumb.Load() {
		return len(packet), nil
	}
	return s.UDPConn.WriteToUDPAddrPort(packet, to)
}

func (v *valve) note(packet []byte, from netip.AddrPort) {
	if stun.Is(packet) {
		return
	}
	isDisco := disco.LooksLikeDiscoWrapper(packet)
	if isDisco {
		v.disco.Add(1)
	} else {
		v.wireguard.Add(1)
	}
	from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
	v.mutex.Lock()
	defer v.mutex.Unlock()
	if v.heard == nil {
		v.heard = map[netip.AddrPort]bool{}
	}
	if !v.heard[from] {
		v.heard[from] = true
		say(event{"event": "heard", "from": from.String(), "disco": isDisco})
	}
}
