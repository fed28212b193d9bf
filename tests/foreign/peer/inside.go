package main

import (
	"context"
	"errors"
	"io"
	"net/netip"
	"os"

	"github.com/tailscale/wireguard-go/tun"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"tailscale.com/net/packet"
)

const (
	innerMTU   = 1280
	innerQueue = 512
	// Where TCP sends back what it gets.
	echoPort = 7

	onlyNIC tcpip.NICID = 1
)

// Inside is the device of the agent's WireGuard: a stack that answers echo requests and serves TCP, and TSMP,
// which no stack knows.
type inside struct {
	link     *channel.Endpoint
	outgoing chan []byte
	events   chan tun.Event
	context  context.Context
	close    context.CancelFunc
}

func newInside(own netip.Addr) (*inside, error) {
	in := &inside{
		link:     channel.New(innerQueue, innerMTU, ""),
		outgoing: make(chan []byte, innerQueue),
		events:   make(chan tun.Event, 1),
	}
	in.context, in.close = context.WithCancel(context.Background())
	host := stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv6.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol},
	})
	if err := host.CreateNIC(onlyNIC, in.link); err != nil {
		return nil, errors.New(err.String())
	}
	address := tcpip.AddrFrom16(own.As16())
	if err := host.AddProtocolAddress(onlyNIC, tcpip.ProtocolAddress{
		Protocol: ipv6.ProtocolNumber, AddressWithPrefix: address.WithPrefix(),
	}, stack.AddressProperties{}); err != nil {
		return nil, errors.New(err.String())
	}
	host.SetRouteTable([]tcpip.Route{{Destination: header.IPv6EmptySubnet, NIC: onlyNIC}})
	listener, err := gonet.ListenTCP(host, tcpip.FullAddress{Addr: address, Port: echoPort}, ipv6.ProtocolNumber)
	if err != nil {
		return nil, err
	}
	go echo(listener)
	go in.forward()
	in.events <- tun.EventUp
	return in, nil
}

func echo(listener *gonet.TCPListener) {
	for {
		client, err := listener.Accept()
		if err != nil {
			return
		}
		go func() {
			defer client.Close()
			io.Copy(client, client)
		}()
	}
}

func (in *inside) forward() {
	for {
		packet := in.link.ReadContext(in.context)
		if packet == nil {
			return
		}
		view := packet.ToView()
		packet.DecRef()
		in.outgoing <- view.AsSlice()
	}
}

func (in *inside) Read(buffers [][]byte, sizes []int, offset int) (int, error) {
	select {
	case packet := <-in.outgoing:
		sizes[0] = copy(buffers[0][offset:], packet)
		return 1, nil
	case <-in.context.Done():
		return 0, os.ErrClosed
	}
}

func (in *inside) Write(buffers [][]byte, offset int) (int, error) {
	for _, raw := range buffers {
		packet := append([]byte(nil), raw[offset:]...)
		if answer := pong(packet); answer != nil {
			in.outgoing <- answer
			continue
		}
		buffered := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(packet)})
		in.link.InjectInbound(ipv6.ProtocolNumber, buffered)
		buffered.DecRef()
	}
	return len(buffers), nil
}

// Pong answers a ping of TSMP; nothing for another packet.
func pong(raw []byte) []byte {
	var parsed packet.Parsed
	parsed.Decode(raw)
	ping, isPing := parsed.AsTSMPPing()
	if !isPing {
		return nil
	}
	back := parsed.IP6Header()
	back.Src, back.Dst = back.Dst, back.Src
	return packet.Generate(packet.TSMPPongReply{IPHeader: back, Data: ping.Data}, nil)
}

func (in *inside) File() *os.File           { return nil }
func (in *inside) MTU() (int, error)        { return innerMTU, nil }
func (in *inside) Name() (string, error)    { return "inside", nil }
func (in *inside) Events() <-chan tun.Event { return in.events }
func (in *inside) BatchSize() int           { return 1 }

func (in *inside) Close() error {
	in.close()
	close(in.events)
	return nil
}
