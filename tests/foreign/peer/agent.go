package main

import (
	"crypto/tls"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"github.com/tailscale/wireguard-go/device"
	"tailscale.com/health"
	"tailscale.com/ipn/ipnstate"
	"tailscale.com/net/netmon"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
	"tailscale.com/util/eventbus"
	"tailscale.com/util/usermetric"
	"tailscale.com/wgengine/magicsock"
	"tailscale.com/wgengine/wgcfg"
)

// How often it looks which way its packets take.
const pathLook = 10 * time.Millisecond

// A workspaceAgent is what the libraries of deployed agents make of one: their paths, their WireGuard, and a TCP
// behind it. Who is told what by the coordinator is the test's business.
type workspaceAgent struct {
	private   key.NodePrivate
	addresses []netip.Prefix
	paths     *magicsock.Conn
	device    *device.Device
	udp       *valve

	mutex     sync.Mutex
	peers     map[key.NodePublic]*tailcfg.Node
	numbers   tailcfg.NodeID
	endpoints []string
	home      int
}

// Agent finds its relays and STUN servers at a deployment, as deployed ones do.
func agent(arguments []string) (event, func(order) error, error) {
	flags := flag.NewFlagSet("agent", flag.ContinueOnError)
	url := flags.String("url", "", "of the deployment")
	token := flags.String("token", "", "to show there")
	address := flags.String("address", "", "its own inside the tunnel")
	if err := flags.Parse(arguments); err != nil {
		return nil, nil, err
	}
	own, err := netip.ParseAddr(*address)
	if err != nil {
		return nil, nil, err
	}
	relays, err := relaysOf(*url, http.Header{tokenHeader: {*token}})
	if err != nil {
		return nil, nil, err
	}
	a := &workspaceAgent{
		private:   key.NewNode(),
		addresses: []netip.Prefix{netip.PrefixFrom(own, own.BitLen())},
		udp:       new(valve),
		peers:     map[key.NodePublic]*tailcfg.Node{},
	}
	if err := a.openPaths(relays); err != nil {
		return nil, nil, err
	}
	if err := a.openTunnel(own); err != nil {
		return nil, nil, err
	}
	go a.watchPaths()
	binary, err := a.private.Public().MarshalBinary()
	return event{
		"node":        a.private.Public().String(),
		"node_binary": binary,
		"disco":       a.paths.DiscoPublicKey().String(),
		"port":        echoPort,
	}, a.obey, err
}

func (a *workspaceAgent) openPaths(relays *tailcfg.DERPMap) error {
	bus := eventbus.New()
	var err error
	a.paths, err = magicsock.NewConn(magicsock.Options{
		EventBus:               bus,
		Logf:                   logf,
		EndpointsFunc:          a.haveEndpoints,
		TestOnlyPacketListener: a.udp,
		NetMon:                 netmon.NewStatic(),
		HealthTracker:          health.NewTracker(bus),
		Metrics:                new(usermetric.Registry),
		DisablePortMapper:      true,
	})
	if err != nil {
		return err
	}
	a.paths.SetNetInfoCallback(a.haveHome)
	if err := a.paths.SetPrivateKey(a.private); err != nil {
		return err
	}
	a.tellPaths()
	a.paths.SetDERPMap(relays)
	return nil
}

func (a *workspaceAgent) openTunnel(own netip.Addr) error {
	inside, err := newInside(own)
	if err != nil {
		return err
	}
	logger := &device.Logger{Verbosef: device.DiscardLogf, Errorf: logf}
	a.device = wgcfg.NewDevice(inside, a.paths.Bind(), logger)
	a.device.SetPeerLookupFunc(wgcfg.NewPeerLookupFunc(a.paths.Bind(), logf, a.allowed))
	if err := a.device.SetPrivateKey(device.NoisePrivateKey(a.private.Raw32())); err != nil {
		return err
	}
	return a.device.Up()
}

func (a *workspaceAgent) allowed(of device.NoisePublicKey) ([]netip.Prefix, bool) {
	a.mutex.Lock()
	defer a.mutex.Unlock()
	for public, peer := range a.peers {
		if public.Raw32() == of {
			return peer.AllowedIPs, true
		}
	}
	return nil, false
}

func (a *workspaceAgent) haveEndpoints(found []tailcfg.Endpoint) {
	a.mutex.Lock()
	defer a.mutex.Unlock()
	a.endpoints = nil
	for _, endpoint := range found {
		a.endpoints = append(a.endpoints, endpoint.Addr.String())
	}
	a.tellSelf()
}

func (a *workspaceAgent) haveHome(info *tailcfg.NetInfo) {
	a.mutex.Lock()
	defer a.mutex.Unlock()
	a.home = info.PreferredDERP
	a.tellSelf()
}

func (a *workspaceAgent) tellSelf() {
	if a.home != 0 {
		say(event{"event": "self", "region": a.home, "endpoints": a.endpoints})
	}
}

// TellPaths gives the path engine its network map.
func (a *workspaceAgent) tellPaths() {
	self := &tailcfg.Node{
		ID: 1, Key: a.private.Public(), DiscoKey: a.paths.DiscoPublicKey(),
		Addresses: a.addresses, AllowedIPs: a.addresses, MachineAuthorized: true,
	}
	var peers []tailcfg.NodeView
	for _, peer := range a.peers {
		peers = append(peers, peer.View())
	}
	a.paths.SetNetworkMap(self.View(), peers)
}

// WatchPaths says where a peer's packets are sent directly, whenever that changes.
func (a *workspaceAgent) watchPaths() {
	said := map[key.NodePublic]string{}
	for range time.Tick(pathLook) {
		builder := &ipnstate.StatusBuilder{WantPeers: true}
		a.paths.UpdateStatus(builder)
		for peer, status := range builder.Status().Peer {
			if said[peer] != status.CurAddr {
				said[peer] = status.CurAddr
				say(event{"event": "path", "node": peer.String(), "address": status.CurAddr})
			}
		}
	}
}

func (a *workspaceAgent) obey(given order) error {
	switch given.Order {
	case "know":
		return a.know(given)
	case "block_udp":
		a.udp.isDeaf.Store(given.Text != "sent")
		a.udp.isDumb.Store(given.Text != "received")
	case "allow_udp":
		a.udp.isDeaf.Store(false)
		a.udp.isDumb.Store(false)
	case "count":
		say(event{"event": "counted", "disco": a.udp.disco.Load(), "wireguard": a.udp.wireguard.Load()})
	default:
		return fmt.Errorf("unknown")
	}
	return nil
}

// Know takes what the coordinator tells of a peer.
func (a *workspaceAgent) know(given order) error {
	peer := &tailcfg.Node{HomeDERP: given.Region, MachineAuthorized: true}
	if err := peer.Key.UnmarshalText([]byte(given.Node)); err != nil {
		return err
	}
	if err := peer.DiscoKey.UnmarshalText([]byte(given.Disco)); err != nil {
		return err
	}
	for _, text := range given.Endpoints {
		endpoint, err := netip.ParseAddrPort(text)
		if err != nil {
			return err
		}
		peer.Endpoints = append(peer.Endpoints, endpoint)
	}
	for _, text := range given.Addresses {
		address, err := netip.ParsePrefix(text)
		if err != nil {
			return err
		}
		peer.Addresses = append(peer.Addresses, address)
	}
	peer.AllowedIPs = peer.Addresses
	a.mutex.Lock()
	defer a.mutex.Unlock()
	if known := a.peers[peer.Key]; known != nil {
		peer.ID = known.ID
	} else {
		a.numbers++
		peer.ID = a.numbers + 1
	}
	a.peers[peer.Key] = peer
	a.tellPaths()
	say(event{"event": "knows", "id": given.Text, "node": given.Node})
	return nil
}

// RelaysOf asks a deployment for its relays. Those that have no TLS, which the library insists upon, get it here.
// A region of STUN servers only, which the library would choose for its home, becomes a part of the others.
func relaysOf(url string, header http.Header) (*tailcfg.DERPMap, error) {
	told, err := fetch(url+"/api/v2/workspaceagents/connection", header)
	if err != nil {
		return nil, err
	}
	var connection struct {
		Map tailcfg.DERPMap `json:"derp_map"`
	}
	if err := json.Unmarshal(told, &connection); err != nil {
		return nil, err
	}
	regions, questions := connection.Map.Regions, &tailcfg.DERPNode{STUNPort: -1}
	for number, region := range regions {
		if node := region.Nodes[0]; node.STUNOnly {
			questions = node
			delete(regions, number)
		}
	}
	for _, region := range regions {
		for _, node := range region.Nodes {
			behind := net.JoinHostPort(node.HostName, fmt.Sprint(node.DERPPort))
			if node.DERPPort, err = encrypt(behind); err != nil {
				return nil, err
			}
			node.IPv4, node.InsecureForTests = "127.0.0.1", true
			node.STUNTestIP, node.STUNPort = questions.HostName, questions.STUNPort
		}
	}
	return &connection.Map, nil
}

// Encrypt is TLS in front of what has none. It gives the port.
func encrypt(behind string) (int, error) {
	certificate, err := selfSigned()
	if err != nil {
		return 0, err
	}
	listener, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{certificate}})
	if err != nil {
		return 0, err
	}
	go func() {
		for {
			front, err := listener.Accept()
			if err != nil {
				return
			}
			go join(front, behind)
		}
	}()
	return listener.Addr().(*net.TCPAddr).Port, nil
}

func join(front net.Conn, behind string) {
	defer front.Close()
	back, err := net.Dial("tcp", behind)
	if err != nil {
		return
	}
	go func() {
		defer back.Close()
		io.Copy(back, front)
	}()
	io.Copy(front, back)
}
